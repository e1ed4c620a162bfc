"""trimmed_mean: the coordinate-wise mean without the `trim` largest and the `trim` smallest values.

Up to `trim` clients may send anything. Yin et al. 2018, arXiv:1803.01498. `trim` is a number of clients on each side
and not a fraction: int(0.29 * 100) is 28. trim 0 is the plain mean. Sizes are ignored. On LoRA it works on the numbers
of A and of B and depends on their gauge, as median does. The server holds all replies of a round.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import adapters, at_least
from weft.core import trees
from weft.core.types import Algorithm, Reply, State, Tally


def trimmed_mean(trim: Annotated[int, Field(ge=0)] = 1) -> Algorithm:
    """Average every number over the clients that are neither among its largest nor its smallest.

    trim: clients left out on each side.
    """
    least = 2 * trim + 1

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        stack = trees.stack(adapters(replies, state, tally, least))
        inner = {name: value.sort(dim=0).values[trim : len(value) - trim] for name, value in stack.items()}
        return {"adapter": {name: value.double().mean(0).to(value.dtype) for name, value in inner.items()}}

    check = at_least("trimmed_mean", least, "trim", trim)
    return replace(fedavg(), combine=combine, check=check)
