"""Low-rank factors by their names: dW = scale B A for each pair lora_B (out, rank), lora_A (rank, in).

A tensor is a factor by its name and never by its shape, which is the same for both in a square layer. All other
tensors, such as heads, are the `rest`. The scale is one for all pairs whatever their rank, so sums and stacks of pairs
need none. No (out, in) matrix is ever formed. Functions on named tensors take a leading client axis as well, but for
those that say (out, rank).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.types import Gradient, Tensors

A, B = ".lora_A.", ".lora_B."


def axis(name: str) -> int | None:
    """Return where a factor's ranks run, from the end: rows of A, columns of B; None for any other tensor.

    >>> axis("q_proj.lora_A.default.weight"), axis("q_proj.lora_B.default.weight"), axis("classifier.weight")
    (-2, -1, None)
    """
    return -2 if A in name else -1 if B in name else None


def factors(tensors: Tensors) -> Tensors:
    """Return the factors alone."""
    return {name: tensor for name, tensor in tensors.items() if axis(name)}


def rest(tensors: Tensors) -> Tensors:
    """Return what is no factor."""
    return {name: tensor for name, tensor in tensors.items() if not axis(name)}


def pairs(tensors: Tensors) -> list[tuple[str, str]]:
    """Return the names of B and A of every pair."""
    return [(name.replace(A, B), name) for name in tensors if A in name]


def ranks(tensors: Tensors, name: str) -> int:
    """Return the ranks of one factor; 0 for any other tensor and for one that is not there."""
    at = axis(name)
    return tensors[name].shape[at] if at and name in tensors else 0


def join(*parts: Tensors) -> Tensors:
    """Return factors side by side, [B1 B2 ...] and [A1; A2; ...]: their products add up."""
    return {name: torch.cat([part[name] for part in parts], axis(name) or 0) for name in factors(parts[0])}


def above(side: Tensors, tensors: Tensors) -> Tensors:
    """Return tensors with the ranks of `side` in front of their own: what a client trains from."""
    return {name: torch.cat([side[name], t], at) if (at := axis(name)) else t for name, t in tensors.items()}


def below(side: Tensors, tensors: Tensors) -> Tensors:
    """Undo `above`: leave out the first ranks, those of `side`."""
    result = dict(tensors)
    for name in factors(tensors):
        taken = ranks(side, name)
        result[name] = tensors[name].narrow(axis(name) or 0, taken, ranks(tensors, name) - taken)
    return result


def minus(tensors: Tensors) -> Tensors:
    """Return factors of -B A."""
    return {name: -tensor if B in name else tensor for name, tensor in factors(tensors).items()}


def no_ranks(tensors: Tensors) -> Tensors:
    """Return factors of rank 0, whose product is zero."""
    return {name: tensor.narrow(axis(name) or 0, 0, 0).clone() for name, tensor in factors(tensors).items()}


def frozen(side: Tensors) -> Gradient:
    """Return a gradient that keeps the first ranks, those of `side`, as they are."""

    def gradient(grads: Tensors, params: Tensors, rows: Tensor) -> Tensors:
        result = dict(grads)
        for name in side:
            result[name] = grads[name].clone()
            result[name].narrow(axis(name) or 0, 0, ranks(side, name)).zero_()
        return result

    return gradient


@dataclass(frozen=True)
class Resting:
    """A gradient that keeps the tensors of some names as they are; a private step neither clips nor noises them."""

    rests: Callable[[str], bool]

    def __call__(self, grads: Tensors, params: Tensors, rows: Tensor) -> Tensors:
        """Return the gradients with zeros where a tensor rests."""
        return {name: torch.zeros_like(grad) if self.rests(name) else grad for name, grad in grads.items()}


def resting(rests: Callable[[str], bool]) -> Gradient:
    """Return a gradient that keeps the tensors of some names as they are."""
    return Resting(rests)


def limited(tensors: Tensors, own: Tensor) -> Tensors:
    """Return a stack of clients with both factors zero from each client's rank on; own: (clients,), 0: all.

    Where both are zero their gradients are zero as well, so they stay.
    """
    result = dict(tensors)
    for name in factors(tensors):
        most = ranks(tensors, name)
        beyond = torch.arange(most) >= torch.where(own > 0, own, most).unsqueeze(1)  # (clients, ranks)
        result[name] = tensors[name].masked_fill(beyond.unsqueeze(2 if A in name else 1), 0.0)
    return result


def trimmed(tensors: Tensors) -> Tensors:
    """Return one client's tensors without the last ranks that are zero in both factors, which need not travel."""
    result = dict(tensors)
    for b, a in pairs(tensors):
        used = (tensors[b] != 0).any(0) | (tensors[a] != 0).any(1)
        count = int(used.nonzero().max()) + 1 if used.any() else 0
        result[b], result[a] = tensors[b][:, :count].contiguous(), tensors[a][:count].contiguous()
    return result


def compact(tensors: Tensors, least: int = 0) -> Tensors:
    """Return factors (out, rank), (rank, in) without the ranks whose product is zero, but at least so many."""
    result = {}
    for b, a in pairs(tensors):
        used = (tensors[b] != 0).any(0) & (tensors[a] != 0).any(1)
        used[: max(0, least - int(used.sum()))] = True
        result[b], result[a] = tensors[b][:, used], tensors[a][used]
    return {name: result[name] for name in factors(tensors)}


def stacked(clients: Sequence[Tensors], shares: Sequence[float]) -> Tensors:
    """Return [p_1 B_1, p_2 B_2, ...] and [A_1; A_2; ...] in float64: their product is sum_k p_k B_k A_k."""
    weighted = [
        {name: t.double() * share if B in name else t.double() for name, t in factors(client).items()}
        for client, share in zip(clients, shares, strict=True)
    ]
    return join(*weighted)


def single(tensors: Tensors) -> Tensors:
    """Return tensors as float32."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, n), S (n,), V^T (n, in) of left (out, rank) @ right (rank, in), in float64.

    From QR of both factors and the decomposition of a (rank, rank) core. The largest entry of each row of V^T is
    positive: a decomposition leaves the signs open.
    """
    outer, upper = torch.linalg.qr(left.double())
    inner, lower = torch.linalg.qr(right.double().T)
    u, values, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    columns, rows = outer @ u, vt @ inner.T
    signs = torch.where(rows.gather(1, rows.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).double()
    return columns * signs.T, values, rows * signs


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U_r S_r and V_r^T: the best approximation of left @ right of at most this rank, in float64."""
    u, values, vt = svd(left, right)
    return u[:, :rank] * values[:rank], vt[:rank]


def bounded(tensors: Tensors, most: int | None) -> Tensors:
    """Return factors of no more than `most` ranks, the best such; without `most`, of no more than full rank.

    A product (out, in) has at most min(out, in) ranks, so the second loses nothing.
    """
    result = dict(tensors)
    for b, a in pairs(tensors):
        limit = min(len(tensors[b]), tensors[a].shape[1], most or ranks(tensors, a))
        if ranks(tensors, a) > limit:
            result[b], result[a] = truncated(tensors[b], tensors[a], limit)
    return single(result)


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return |B A|_F = sqrt(sum over (B^T B) * (A A^T)), in float64; left (..., out, rank), right (..., rank, in)."""
    left, right = left.double(), right.double()
    return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1)).clamp(min=0).sqrt()
