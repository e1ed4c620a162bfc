"""geometric_median: the point with the smallest sum of distances to all updates; fewer than half may send anything.

Smoothed Weiszfeld steps: z <- sum_k b_k D_k with b_k ~ 1 / max(smoothing, |D_k - z|), from the plain mean on. Pillutla
et al. 2022 (RFA), arXiv:1912.13445. RFA stops after 4 steps, which leave much of an attack of size 1e6; here they go on
until the shares b stand still, which costs nothing: z is always a mean of the D_k, so the steps need only the inner
products of the updates. Sizes are ignored. For LoRA pairs distances and mean are those of the products B A, brought
back to the adapter's rank (effective.py), whatever the gauge of the factors. The server holds all replies of a round.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.effective import gram, mean
from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import adapters, one_rank
from weft.core.types import Algorithm, Reply, State, Tally

MOST_STEPS, STILL = 10_000, 1e-10


def geometric_median(smoothing: Annotated[float, Field(gt=0)] = 1e-5) -> Algorithm:
    """Average the updates with shares that fall with the distance from the result.

    smoothing: distances below it count as this much.
    """

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        trained = adapters(replies, state, tally)
        shares = weiszfeld(gram(trained, state["adapter"]), smoothing)
        return {"adapter": mean(trained, shares.tolist(), state["adapter"])}

    return replace(fedavg(), combine=combine, check=one_rank("geometric_median"))


def weiszfeld(inner: Tensor, smoothing: float) -> Tensor:
    """Return each update's share in the geometric median, (clients,); inner: the updates' Gram matrix."""
    shares = torch.full((len(inner),), 1 / len(inner), dtype=inner.dtype)
    for _ in range(MOST_STEPS):
        squares = inner.diagonal() - 2 * inner @ shares + shares @ inner @ shares
        near = 1 / squares.clamp(min=smoothing**2).sqrt()
        before, shares = shares, near / near.sum()
        if float((shares / before - 1).abs().max()) < STILL:  # relative: a liar at 1e30 ends with a share of 1e-30
            break
    return shares
