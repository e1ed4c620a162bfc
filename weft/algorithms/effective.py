"""Inner products and means of effective updates, free of the gauge of LoRA factors, and never as a dense product.

(B R, R^-1 A) is the same update dW = B A for every invertible R. What is measured or averaged here is B A for a pair
named as peft names it, and the tensor itself for every other: no R makes an honest client look far away, and none
hides a dishonest one or spoils a mean of factors. The scale of LoRA is left out; it is common to all pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.core import low_rank
from weft.core.low_rank import A, B
from weft.core.types import Tensors

NOTHING = 1e-10  # singular values below this part of the largest are rounding
Factors = tuple[Tensor, Tensor]
"""(clients, out, inner) and (clients, inner, in), float64."""


def gram(adapters: Sequence[Tensors], start: Tensors) -> Tensor:
    """Return the inner products of all pairs of updates, adapter - start, over all tensors: (clients, clients)."""
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in start:
        if A in name:
            total += _gram_of_products(*_changes(_factors(adapters, name), _factors([start], name)))
        elif B not in name:
            rows = torch.stack([adapter[name].double() - start[name].double() for adapter in adapters]).flatten(1)
            total += rows @ rows.T
    return total


def squared_distances(inner: Tensor) -> Tensor:
    """Return |D_i - D_j|^2 from a Gram matrix."""
    norms = inner.diagonal()
    return (norms[:, None] + norms[None] - 2 * inner).clamp(min=0)


def mean(adapters: Sequence[Tensors], shares: Sequence[float], start: Tensors) -> Tensors:
    """Return sum_k shares_k dW_k: of plain tensors the tensor, of a pair the nearest pair of the start's rank.

    The factors depend on the products alone; of all that give them, A is the nearest to the start's with rows at right
    angles and of its length, so that no client decides how the next round's gradient is scaled.
    """
    weights = torch.tensor(shares, dtype=torch.float64)
    result = {}
    for name, value in start.items():
        if A in name:
            left, right = _factors(adapters, name)
            pair = _nearest(left * weights[:, None, None], right, value.double().flatten(1))
            for part, factor in zip((name.replace(A, B), name), pair, strict=True):
                result[part] = factor.view(start[part].shape).to(value)
        elif B not in name:
            rows = torch.stack([adapter[name].double() for adapter in adapters])
            result[name] = torch.tensordot(weights, rows, 1).to(value)
    return {name: result[name] for name in start}


def _factors(adapters: Sequence[Tensors], name: str) -> Factors:
    left = torch.stack([adapter[name.replace(A, B)].double().flatten(1) for adapter in adapters])
    return left, torch.stack([adapter[name].double().flatten(1) for adapter in adapters])


def _changes(ended: Factors, start: Factors) -> Factors:
    """Return B_k A_k - B A as [B_k - B, B] [A_k; A_k - A], where nothing large cancels."""
    (left, right), (left0, right0) = ended, start
    return torch.cat([left - left0, left0.expand_as(left)], 2), torch.cat([right, right - right0], 1)


def _side_by_side(left: Tensor, right: Tensor) -> Factors:
    """Return [U_1 ... U_n] and [V_1; ...; V_n], whose product is the sum of all U_k V_k."""
    return left.permute(1, 0, 2).flatten(1), right.flatten(0, 1)


def _gram_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return <U_i V_i, U_j V_j> = sum over a, b of (U_i^T U_j)_ab (V_i V_j^T)_ab."""
    clients, inner = right.shape[:2]
    wide, tall = _side_by_side(left, right)
    both = (wide.T @ wide) * (tall @ tall.T)
    return both.view(clients, inner, clients, inner).sum((1, 3))


def _nearest(left: Tensor, right: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return B (out, rank), A (rank, in): the best approximation of sum_k U_k V_k, in the gauge nearest to `first`."""
    rank = len(first)
    left, right = _side_by_side(left, right)
    values, rows = low_rank.svd(left, right)[1:]
    kept = rows[:rank][values[:rank] > NOTHING * values[0]]
    rest = first - first @ kept.T @ kept  # directions that no update uses yet, so that they can still be learned
    full = torch.cat([kept, torch.linalg.svd(rest, full_matrices=False)[2][: rank - len(kept)]])
    turn_left, _, turn_right = torch.linalg.svd(first @ full.T)
    length = float(first.norm()) / rank**0.5 or 1.0
    outer = length * turn_left @ turn_right @ full
    return left @ (right @ outer.T) / length**2, outer
