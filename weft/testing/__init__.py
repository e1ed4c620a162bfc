"""Conformance checks: what every algorithm, transform, adapter, task, split and link must pass, yours too.

    from weft.testing import check_algorithm
    check_algorithm(lambda: my_algorithm(strength=0.1))

Each check takes a function that makes the plug-in, raises AssertionError with one sentence where a promise is
broken, and needs no file, no download and no test runner. `waive` names checks that it fails by design.
"""

from weft.testing.adapters import check_adapter
from weft.testing.algorithms import check_algorithm
from weft.testing.links import check_link
from weft.testing.samplers import check_sampler
from weft.testing.splits import check_split
from weft.testing.tasks import check_task
from weft.testing.transforms import check_transform

__all__ = [
    "check_adapter",
    "check_algorithm",
    "check_link",
    "check_sampler",
    "check_split",
    "check_task",
    "check_transform",
]
