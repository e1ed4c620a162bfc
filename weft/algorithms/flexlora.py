"""flexlora: the mean of the products, taken apart again into factors that each client cuts to its own rank.

D = sum_k p_k B_k A_k = U S V^T; the first r columns of U S and rows of V^T are the best approximation of D of rank r,
whatever r a client has. Bai et al. 2024, arXiv:2402.11505. From QR of the clients' factors side by side and the
decomposition of a small core, so that no (out, in) matrix is formed. Exact where the adapter's rank is that of D;
otherwise the journal's aggregation error is what the cut loses. A rank that D does not need begins as a new one does,
with B zero and A as it was.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from weft.algorithms.refusals import low_rank as refuse
from weft.algorithms.stacking import any_ranks, mean_rest, shares, trained
from weft.core import low_rank, trees
from weft.core.types import Algorithm, Reply, State, Tally, Work

NOTHING = 1e-10  # singular values below this part of the largest are rounding


def flexlora(values: Literal["left", "both"] = "left") -> Algorithm:
    """Average the products and cut the result to each client's rank.

    values: which factor takes the singular values: `left` gives all to B, `both` the square root to each.
    """

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        return {"trained": work.train(low_rank.limited(received["adapter"], work.ranks))}, kept

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        clients = trained(replies, state, tally)
        stack = low_rank.stacked(clients, shares(replies, tally))
        whole = dict(state["adapter"])
        for b, a in low_rank.pairs(stack):
            whole[b], whole[a] = split(stack[b], stack[a], whole[a], values)
        return {"adapter": trees.merged(whole, mean_rest(clients, replies, tally))}

    return any_ranks(client, combine, check=refuse("flexlora", mixed=True, anew=True))


def split(left: Tensor, right: Tensor, before: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """Return float32 B (out, rank), A (rank, in) nearest to left @ right, with the rank of `before`, the last A."""
    u, found, vt = low_rank.svd(left, right)
    count = min(len(before), int((found > NOTHING * found[:1]).sum()))
    b, a = torch.zeros(len(left), len(before)), before.clone()
    root = found[:count].sqrt() if values == "both" else torch.ones(count, dtype=torch.float64)
    b[:, :count] = (u[:, :count] * (found[:count] / root)).float()
    a[:count] = (vt[:count] * root.unsqueeze(1)).float()
    return b, a
