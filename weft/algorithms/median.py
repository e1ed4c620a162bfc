"""median: the coordinate-wise median of the clients' adapters; half of the clients less one may send anything.

For an even number of clients the mean of the middle two. Yin et al. 2018, arXiv:1803.01498. Sizes are ignored: a
declared number of examples is one more thing that a client may lie about. On LoRA it works on the numbers of A and of
B, which depend on the gauge: an honest client that sends (B R, R^-1 A) counts as an outlier, and the median of the
factors is not that of the products. The server holds all replies of a round, so secure aggregation is impossible.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import adapters, one_rank
from weft.core import trees
from weft.core.types import Algorithm, Reply, State, Tally


def median() -> Algorithm:
    """Take the middle value of every number."""

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        stack = trees.stack(adapters(replies, state, tally))
        return {"adapter": {name: _middle(value) for name, value in stack.items()}}

    return replace(fedavg(), combine=combine, check=one_rank("median"))


def _middle(values: torch.Tensor) -> torch.Tensor:
    """Return the median along the first axis; torch.median would take the lower of the middle two."""
    ordered, count = values.sort(dim=0).values.double(), len(values)
    return ((ordered[(count - 1) // 2] + ordered[count // 2]) / 2).to(values.dtype)
