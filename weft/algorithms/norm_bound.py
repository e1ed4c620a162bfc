"""norm_bound: each client's update is shortened to a norm before the mean, so that none counts for more than it.

w <- w + sum_k p_k D_k min(1, norm / |D_k|) with D_k = w_k - w over all numbers together. Sun et al. 2019, "Can You
Really Backdoor Federated Learning?", arXiv:1911.07963. The server shortens, so a client need not be trusted to. One
client moves the result by at most p_k norm: a bound, no protection from many; the weights p_k are the pipeline's, so
where declared sizes are not to be trusted set `weigh: {by: uniform}`. For LoRA the norm is that of the factors: it
bounds B A as well, but an honest client in another gauge (B R, R^-1 A) is shortened. The server holds all replies of a
round. Where nobody is shortened the bits are those of fedavg.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import adapters, one_rank
from weft.core import trees
from weft.core.sums import Sum
from weft.core.types import Algorithm, Reply, State, Tally, Tensors


def norm_bound(norm: Annotated[float, Field(gt=0)]) -> Algorithm:
    """Average updates of bounded length.

    norm: the largest L2 norm of a client's update.
    """

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        total = Sum()
        for reply, trained in zip(replies, adapters(replies, state, tally), strict=True):
            total.add({"adapter": _shortened(trained, state["adapter"], norm)}, tally.weights[reply.client])
        return total.divided(total.weight)

    return replace(fedavg(), combine=combine, check=one_rank("norm_bound"))


def _shortened(trained: Tensors, start: Tensors, norm: float) -> Tensors:
    """Return start + D min(1, norm / |D|)."""
    change = {name: value.double() - start[name].double() for name, value in trained.items()}
    length = trees.norm(change)
    if length <= norm:
        return trained
    return {name: (start[name].double() + value * (norm / length)).float() for name, value in change.items()}
