"""What a round did, measured as replies arrive: the error of the server step, the spread of the clients.

Both are taken of what an adapter does and not of its factors: of the effective updates dW = U V where the method has
them, of every other tensor as it is. The error is the distance of the server step from the mean of the clients' dW.

The norm of sum_i p_i U_i V_i is taken through a fixed projection P of `in` to 64 columns: U_i (V_i P) is small,
adds up as replies arrive and needs memory for one client only. Layers with at most 64 inputs are measured exactly
(P is the identity); on wider ones E|X P|^2 = |X|^2 and the estimate of a norm is off by a tenth at most, typically
a few percent. An exact server step gives a tiny error either way. No (out, in) matrix is ever formed.
"""

import math

import torch
from torch import Tensor

from weft.core import keys, low_rank, trees
from weft.core.types import Products, Tensors

COLUMNS = 64
KEPT = 64 << 20  # bytes of projections that are kept: each is the same for every client and round
_drawn: dict[tuple[str, int], Tensor] = {}


def _projection(module: str, wide: int) -> Tensor:
    """Return P of a module, (wide, 64): drawn at its address, and once for as many modules as `KEPT` holds."""
    found = _drawn.get((module, wide))
    if found is None:
        draw = keys.generator(0, "projection", module, wide)
        found = torch.randn(wide, COLUMNS, generator=draw, dtype=torch.float64) / COLUMNS**0.5
        if sum(kept.nbytes for kept in _drawn.values()) + found.nbytes > KEPT:
            _drawn.clear()
        _drawn[module, wide] = found
    return found


def _project(factors: tuple[Tensor, Tensor], module: str) -> Tensor:
    """Return U V P, shape (out, at most 64), in float64."""
    left, right = factors[0].double(), factors[1].double()
    wide = right.shape[1]
    if wide <= COLUMNS:
        return torch.matmul(left, right)
    return torch.matmul(left, right @ _projection(module, wide))


def projected(products: Products) -> Tensors:
    """Return U V P of each module."""
    return {module: _project(factors, module) for module, factors in products.items()}


def seen(adapter: Tensors, products: Tensors) -> Tensors:
    """Return what is measured of an adapter: its projected products, and every tensor that is no factor."""
    return {**(low_rank.rest(adapter) if products else adapter), **products}


class MeanUpdate:
    """The running weighted sum of the clients' effective updates, projected."""

    def __init__(self) -> None:
        self.weight = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, products: Products, weight: int) -> None:
        """Count one client's effective update `weight` times."""
        self.count(projected(products), weight)

    def count(self, modules: Tensors, weight: int) -> None:
        """Count one client's projected effective update `weight` times."""
        self.weight += weight
        for module, value in modules.items():
            scaled = value * weight
            self.sums[module] = self.sums[module] + scaled if module in self.sums else scaled

    def error(self, result: Products) -> float:
        """Return |dW_result - mean dW_i| / |mean dW_i| over all modules together; 0 where both vanish."""
        wrong = whole = 0.0
        for module, total in self.sums.items():
            mean = total / self.weight
            wrong += float((_project(result[module], module) - mean).square().sum())
            whole += float(mean.square().sum())
        return math.sqrt(wrong / whole) if whole else math.sqrt(wrong)


class Spread:
    """How far the clients' updates (what they ended with minus what they began with) are from one another.

    With d_k the updates, m their plain mean and u_k = d_k / |d_k|: sum |d_k - m|^2 = sum |d_k|^2 - K |m|^2, and the sum
    of all pairwise cosines is (|sum u_k|^2 - K) / 2. Memory for two updates, whatever the number of clients.
    """

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}
        self.total: Tensors = {}
        self.unit: Tensors = {}

    def add(self, client: str, update: Tensors) -> None:
        """Count one client's update."""
        norm = trees.norm(update)
        self.norms[client] = norm
        for name, value in update.items():
            wide = value.double()
            self.total[name] = self.total[name] + wide if name in self.total else wide
            unit = wide / norm if norm else wide
            self.unit[name] = self.unit[name] + unit if name in self.unit else unit

    def drift(self) -> float | None:
        """Return the root mean square distance of the updates from their mean."""
        count = len(self.norms)
        if not count:
            return None
        squares = sum(norm**2 for norm in self.norms.values()) / count
        return math.sqrt(max(0.0, squares - (trees.norm(self.total) / count) ** 2))

    def cosine(self) -> float | None:
        """Return the mean cosine between the updates of two clients; None for fewer than two that moved."""
        count = sum(norm > 0 for norm in self.norms.values())
        return (trees.norm(self.unit) ** 2 - count) / (count * (count - 1)) if count > 1 else None
