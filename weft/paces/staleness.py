"""What an update counts that began some server steps ago: the functions that fedbuff and fedasync share."""

from collections.abc import Callable
from typing import Literal

Kind = Literal["polynomial", "constant", "hinge"]
SLOPE, FREE = 10, 4  # of the hinge: Xie et al. 2019


def staleness_factor(kind: Kind, exponent: float, scale: float) -> Callable[[int], float]:
    """Return staleness d -> scale times (1 + d)^-exponent, 1, or 1 up to d = 4 and 1 / (10 (d - 4) + 1) beyond."""

    def factor(staleness: int) -> float:
        if kind == "constant":
            return scale
        if kind == "hinge":
            return scale if staleness <= FREE else scale / (SLOPE * (staleness - FREE) + 1)
        return float(scale * (1.0 + staleness) ** -exponent)

    return factor
