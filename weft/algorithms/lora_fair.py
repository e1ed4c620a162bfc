"""lora_fair: the mean of both factors, and B moved to where B A comes nearest to the mean of the products.

With A, B the means and R = sum_k p_k B_k A_k - B A: B <- B + argmin_X |R - X A|^2 + strength |X|^2, which is
X = R A^T (A A^T + strength I)^-1. Bian et al. 2025, arXiv:2411.14961; the paper takes steps on a cosine distance, this
is its least-squares reading, in closed form. What of R is at right angles to the rows of A is lost, and A stays the
mean, so that clients go on from where they were. The strength counts on B A, without LoRA's scale.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import adapters
from weft.algorithms.refusals import low_rank as refuse
from weft.algorithms.stacking import mean, shares
from weft.core import low_rank
from weft.core.types import Algorithm, Reply, State, Tally, Tensors


def lora_fair(strength: Annotated[float, Field(gt=0)] = 0.01) -> Algorithm:
    """Average both factors, then correct B by least squares.

    strength: how much B is held to its mean (the paper's lambda); a large one is fedavg.
    """

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        clients = adapters(replies, state, tally)
        return {"adapter": _corrected(mean(clients, replies, tally), clients, shares(replies, tally))}

    def server(state: State, update: State, tally: Tally) -> State:
        return update

    def _corrected(whole: Tensors, clients: Sequence[Tensors], parts: Sequence[float]) -> Tensors:
        stack, result = low_rank.stacked(clients, parts), dict(whole)
        for b, a in low_rank.pairs(whole):
            left, right = whole[b].double(), whole[a].double()
            gram = right @ right.T
            residual = stack[b] @ (stack[a] @ right.T) - left @ gram  # R A^T
            ridge = gram + strength * torch.eye(len(gram), dtype=torch.float64)
            result[b] = (left + torch.linalg.solve(ridge, residual.T).T).float()
        return result

    return Algorithm(client=fedavg().client, server=server, combine=combine, check=refuse("lora_fair"))
