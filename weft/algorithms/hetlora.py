"""hetlora: clients of unlike ranks, padded with zeros, weighted by the norm of what they learned, pruning themselves.

Client k trains the first r_k ranks of the received factors on its loss + strength sum |B[:, t:]| |A[t:]| over its
layers, t = floor(gamma r_k). Where that sum is smaller after training than before, the client goes on with rank t.
Server: A, B <- sum_k p_k (A_k, B_k with zeros), p_k = |dW_k| / sum_j |dW_j|. Cho et al. 2024, arXiv:2401.06432. Ranks
that no client of the round has stay as they were: with zeros in both factors no gradient would bring them back. The
norm of an update decides its weight, so one client can take over a round by sending a large one.
"""

from collections.abc import Sequence
from math import floor
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.refusals import low_rank as refuse
from weft.algorithms.stacking import any_ranks, mean_rest, shares, trained
from weft.core import low_rank, trees
from weft.core.types import Algorithm, Gradient, Reply, State, Tally, Tensors, Work


def hetlora(
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99,
    strength: Annotated[float, Field(ge=0)] = 0.01,
    min_rank: Annotated[int, Field(gt=0)] = 1,
) -> Algorithm:
    """Train each client's own ranks, and average with zeros for the others.

    gamma: the part of its ranks that a client goes on with when it prunes; 0.99 of less than 100 takes one away, 1
    none. strength: of the pull of the last ranks to zero. min_rank: no client prunes below.
    """

    def keep(adapter: Tensors) -> State:
        return {"rank": {"rank": torch.zeros(1)}}  # 0: not pruned yet, the job's

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        most = max(low_rank.ranks(received["adapter"], name) for name in low_rank.factors(received["adapter"]))
        given = torch.where(work.ranks > 0, work.ranks, most)
        pruned = kept["rank"]["rank"][:, 0].long()
        own = torch.where(pruned > 0, pruned, given)
        less = torch.tensor([max(floor(gamma * rank + 1e-9), min(min_rank, rank)) for rank in own.tolist()])
        start = low_rank.limited(received["adapter"], own)
        ended = work.train(start, pull(less, strength))
        smaller = tail(ended, less) < tail(start, less)
        own = torch.where(smaller, less, own)
        return {"trained": low_rank.limited(ended, own)}, {"rank": {"rank": own.float().unsqueeze(1)}}

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        clients = trained(replies, state, tally)
        norms = torch.stack([norm(one) for one in clients])
        parts = norms / norms.sum() if norms.sum() > 0 else torch.tensor(shares(replies, tally), dtype=torch.float64)
        before = low_rank.factors(state["adapter"])
        whole = {name: padded(name, value, clients, parts) for name, value in before.items()}
        return {"adapter": trees.merged(whole, mean_rest(clients, replies, tally))}

    return any_ranks(client, combine, keep=keep, check=refuse("hetlora", mixed=True, anew=True))


def norm(tensors: Tensors) -> Tensor:
    """Return |dW| over all layers of one client, or of each of a stack, in float64, without the scale."""
    squares = [low_rank.product_norm(tensors[b], tensors[a]) ** 2 for b, a in low_rank.pairs(tensors)]
    return torch.stack(squares).sum(0).sqrt()


def padded(name: str, before: Tensor, clients: Sequence[Tensors], parts: Tensor) -> Tensor:
    """Return sum_k p_k of a factor, with zeros where a client has no rank; ranks that none has stay as `before`."""
    at, result = low_rank.axis(name) or 0, before.clone()
    most = max(low_rank.ranks(one, name) for one in clients)
    total = torch.zeros_like(result, dtype=torch.float64)
    for one, part in zip(clients, parts, strict=True):
        total.narrow(at, 0, low_rank.ranks(one, name)).add_(one[name].double() * part)
    result.narrow(at, 0, most).copy_(total.narrow(at, 0, most))
    return result


def _from(name: str, factor: Tensor, first: Tensor) -> Tensor:
    """Return a stack's factor with the ranks before each client's `first`, (clients,), zero."""
    at = low_rank.axis(name) or 0
    before = torch.arange(factor.shape[at], device=factor.device) < first.to(factor.device).unsqueeze(1)
    return factor.masked_fill(before.unsqueeze(2 if at == -2 else 1), 0.0)


def tail(tensors: Tensors, first: Tensor) -> Tensor:
    """Return each client's sum over the layers of |B[:, t:]| |A[t:]|, with t its `first`, in float64."""
    total = torch.zeros(len(first), dtype=torch.float64)
    for b, a in low_rank.pairs(tensors):
        left, right = (_from(name, tensors[name].double(), first).flatten(1).norm(dim=1) for name in (b, a))
        total += left * right
    return total


def pull(first: Tensor, strength: float) -> Gradient:
    """Return a gradient with that of strength * tail added: strength |A[t:]| B[:, t:] / |B[:, t:]|, and so for A."""

    def gradient(grads: Tensors, params: Tensors, rows: Tensor) -> Tensors:
        result, start = dict(grads), first.to(rows.device)[rows]
        for pair in low_rank.pairs(grads):
            tails = [_from(name, params[name], start) for name in pair]
            norms = [part.double().flatten(1).norm(dim=1).view(-1, 1, 1) for part in tails]
            for name, part, own, other in zip(pair, tails, norms, norms[::-1], strict=True):
                ratio = torch.where(own > 0, other / own.clamp(min=1e-30), 0.0)
                result[name] = grads[name] + part * (strength * ratio).to(part)
        return result

    return gradient
