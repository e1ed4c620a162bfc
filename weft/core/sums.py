"""The exact sum: weighted sums of float32 tensors as fixed-point integers, free of order.

Each value is written as a multiple of 2^-80 in three int64 limbs of 32 bits, so integer sums never round.
Replies may arrive in any order, partial sums may be merged, the server holds one sum and not the updates, and
the mean of equal inputs is that input, bit for bit. Exact for zero and for every float32 from 2^-56 (1.4e-17) up;
what is smaller is rounded to a multiple of 2^-80 (8.3e-25), and -0.0 comes back as 0.0. The bounds below make
overflow impossible.
"""

import torch
from torch import Tensor

from weft.core import trees
from weft.core.errors import RunError
from weft.core.types import State

LIMIT = 2.0**15  # values stay below this in magnitude
MOST_WEIGHT = 2**29  # the sum of all weights stays below this: 2^31 * 2^29 < 2^63
_LIMB = 2**32


def _add(limbs: Tensor, value: Tensor, weight: int) -> None:
    """Add weight * value to signed limbs (3, *shape), in place, most significant first: units 2^-16, 2^-48, 2^-80."""
    rest = value.double().mul_(weight * 2.0**16)  # exact: 24 bits of a float32 times 29 bits of a weight
    for limb in limbs[:2]:
        whole = rest.trunc()
        limb += whole.long()
        rest = rest.sub_(whole).mul_(_LIMB)
    limbs[2] += rest.round_().long()


def _carry(limbs: Tensor) -> Tensor:
    """Bring the two lower limbs into [0, 2^32); the sign then stands in the highest."""
    high, middle, low = limbs
    middle = middle + torch.div(low, _LIMB, rounding_mode="floor")
    high = high + torch.div(middle, _LIMB, rounding_mode="floor")
    return torch.stack([high, middle % _LIMB, low % _LIMB])


def _divide(limbs: Tensor, divisor: int) -> Tensor:
    """Divide by long division, limb by limb, and round to float32."""
    limbs = _carry(limbs)
    negative = limbs[0] < 0
    high, middle, low = _carry(torch.where(negative, -limbs, limbs))
    quotients = []
    remainder = torch.zeros_like(high)
    for limb in (high, middle, low):
        whole = remainder * _LIMB + limb
        quotients.append(torch.div(whole, divisor, rounding_mode="floor").double())
        remainder = whole % divisor
    value = quotients[0] * 2.0**-16 + (quotients[1] * 2.0**-48 + quotients[2] * 2.0**-80)
    return torch.where(negative, -value, value).float()


def _unlike(state: State, limbs: State) -> str | None:
    """Return the part/name of the first tensor that the sum does not hold in the same shape, or that is missing."""
    got, held = trees.flatten(state), trees.flatten(limbs)
    for name in sorted(got.keys() | held.keys()):
        if name not in got or name not in held or got[name].shape != held[name].shape[1:]:
            return name
    return None


class Sum:
    """A running sum of weight * state; adding in any order, or merging partial sums, gives the same bits."""

    def __init__(self) -> None:
        self.weight = 0
        self.limbs: State = {}

    def add(self, state: State, weight: int) -> None:
        """Add one state, counted `weight` times; raise RunError for what a sum cannot hold."""
        if not 0 < weight < MOST_WEIGHT - self.weight:
            raise RunError(f"a weight of {weight} does not fit: weights are positive and sum to less than 2^29")
        if self.weight and (unlike := _unlike(state, self.limbs)):
            raise RunError(f"{unlike} is not in all updates alike")
        for part, tree in state.items():
            for name, value in tree.items():
                if not bool((value.abs() < LIMIT).all()):
                    raise RunError(f"{part}/{name} holds a value that is not below {LIMIT:.0f} in magnitude")
        for part, tree in state.items():
            into = self.limbs.setdefault(part, {})
            for name, value in tree.items():
                if name not in into:
                    into[name] = torch.zeros(3, *value.shape, dtype=torch.int64)
                _add(into[name], value, weight)
        self.weight += weight

    def merge(self, other: "Sum") -> None:
        """Add a partial sum taken elsewhere; raise RunError where the weights do not fit together."""
        if self.weight + other.weight >= MOST_WEIGHT:
            raise RunError(f"weights of {self.weight} and {other.weight} do not fit: they sum to less than 2^29")
        self.weight += other.weight
        for part, tree in other.limbs.items():
            into = self.limbs.setdefault(part, {})
            for name, limbs in tree.items():
                into[name] = into[name] + limbs if name in into else limbs.clone()

    def divided(self, divisor: int) -> State:
        """Return the sum divided by a positive integer, rounded once to float32."""
        return {
            part: {name: _divide(tree[name], divisor) for name in sorted(tree)}
            for part, tree in sorted(self.limbs.items())
        }
