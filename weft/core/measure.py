"""How far a server step is from the mean of the effective updates dW = U V, measured on the factors.

The norm of sum_i p_i U_i V_i is taken through a fixed projection P of `in` to 64 columns: U_i (V_i P) is small,
adds up as replies arrive and needs memory for one client only. Layers with at most 64 inputs are measured exactly
(P is the identity); on wider ones E|X P|^2 = |X|^2 and the estimate of a norm is off by a tenth at most, typically
a few percent. An exact server step gives a tiny error either way. No (out, in) matrix is ever formed.
"""

import math

import torch
from torch import Tensor

from weft.core import keys
from weft.core.types import Products

COLUMNS = 64


def _project(factors: tuple[Tensor, Tensor], module: str) -> Tensor:
    """Return U V P, shape (out, at most 64), in float64."""
    left, right = factors[0].double(), factors[1].double()
    wide = right.shape[1]
    if wide <= COLUMNS:
        return torch.matmul(left, right)
    draw = keys.generator(0, "projection", module, wide)
    projection = torch.randn(wide, COLUMNS, generator=draw, dtype=torch.float64) / COLUMNS**0.5
    return torch.matmul(left, right @ projection)


class MeanUpdate:
    """The running weighted sum of the clients' effective updates, projected."""

    def __init__(self) -> None:
        self.weight = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, products: Products, weight: int) -> None:
        """Count one client's effective update `weight` times."""
        self.weight += weight
        for module, factors in products.items():
            projected = _project(factors, module) * weight
            self.sums[module] = self.sums[module] + projected if module in self.sums else projected

    def error(self, result: Products) -> float:
        """Return |dW_result - mean dW_i| / |mean dW_i| over all modules together; 0 where both vanish."""
        wrong = whole = 0.0
        for module, total in self.sums.items():
            mean = total / self.weight
            wrong += float((_project(result[module], module) - mean).square().sum())
            whole += float(mean.square().sum())
        return math.sqrt(wrong / whole) if whole else math.sqrt(wrong)
