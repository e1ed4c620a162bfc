"""Weft fine-tunes one language model together, across sites that cannot share their data. Only adapters travel.

import weft
run = weft.run("job.yaml")
run.results, run.history, run.adapter()
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Job", "Run", "__version__", "load", "load_adapter", "run"]

if TYPE_CHECKING:
    from weft.adapters.folder import load_adapter
    from weft.job import Job, load
    from weft.runs import Run, run

_PLACES = {
    "Job": "weft.job",
    "load": "weft.job",
    "load_adapter": "weft.adapters.folder",
    "Run": "weft.runs",
    "run": "weft.runs",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `weft --help` must not wait for torch."""
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
