"""norm_bound: each client's update is shortened to a norm before the mean, so that none counts for more than it.

w <- w + sum_k p_k D_k min(1, norm / |D_k|). Sun et al. 2019, "Can You Really Backdoor Federated Learning?",
arXiv:1911.07963. The server shortens, so a client need not be trusted to. One client moves the mean by at most p_k
times the norm: a bound, no protection from many; the weights p_k are the pipeline's, so where declared sizes are not to
be trusted set `weigh: {by: uniform}`. For LoRA D_k is the change of dW = B A, without its scale, beside that of all
other tensors: an honest client in another gauge (B R, R^-1 A) is as long as before. The mean is that of the products,
brought back to the adapter's rank (effective.py), so that no factors of 1e6 and 1e-6 spoil it. The server holds all
replies of a round.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.algorithms.effective import gram, mean
from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import adapters, one_rank
from weft.algorithms.stacking import shares
from weft.core.types import Algorithm, Reply, State, Tally


def norm_bound(norm: Annotated[float, Field(gt=0)]) -> Algorithm:
    """Average updates of bounded length.

    norm: the largest L2 norm of a client's update.
    """

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        start, trained = state["adapter"], adapters(replies, state, tally)
        lengths = gram(trained, start).diagonal().clamp(min=0).sqrt().tolist()
        kept = [min(1.0, norm / length) if length else 1.0 for length in lengths]
        parts = [share * part for share, part in zip(shares(replies, tally), kept, strict=True)]
        return {"adapter": mean([*trained, start], [*parts, 1 - sum(parts)], start)}  # start + sum_k part_k D_k

    return replace(fedavg(), combine=combine, check=one_rank("norm_bound"))
