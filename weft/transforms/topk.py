"""topk: only the largest changes travel, with their places; what is left out is sent later.

The floor(fraction n) numbers of largest magnitude of all tensors together, at least one. Places are whole numbers of
the smallest type that holds them, or one bit for every number where that is less. Aji and Heafield 2017,
arXiv:1704.05021; with error feedback Stich et al. 2018, arXiv:1809.07599.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.core import trees
from weft.core.errors import RunError
from weft.core.types import At, State, Transform, Wire
from weft.transforms.error_feedback import coding, differences, unbounded

INTEGERS = ((torch.uint8, 2**8), (torch.uint16, 2**16), (torch.int32, 2**31), (torch.int64, 2**63))


def topk(fraction: Annotated[float, Field(gt=0, le=1)] = 0.1, feedback: bool = True) -> Transform:
    """Send the largest changes.

    fraction: the part of all numbers that travels. feedback: add what was left out to the next update.
    """

    def encode(at: At, update: State) -> State:
        vector = trees.joined(update)
        if not len(vector):
            return update
        places = largest(vector.abs(), chosen(len(vector), fraction))
        return {"topk": {"places": packed(places, len(vector)), "values": vector[places]}}

    def decode(at: At, update: State) -> State:
        if "topk" not in update:
            return update
        numbers = sum(tensor.numel() for tensor in trees.flatten(at.form).values())
        values = update["topk"]["values"]
        whole = torch.zeros(numbers)
        whole[unpacked(update["topk"]["places"], numbers, len(values))] = values
        return trees.parted(whole, at.form)

    def check(wire: Wire) -> Wire:
        differences(wire)
        return replace(unbounded(wire, feedback), encoded="topk")

    return Transform(check=check, client=coding(encode, decode, feedback), arrive=decode, remembers=feedback)


def chosen(numbers: int, fraction: float) -> int:
    """Return how many of so many numbers travel."""
    return max(1, int(numbers * fraction + 1e-9))  # 0.29 * 100 is 28.999999999999996


def largest(sizes: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest, in order; of equal ones the first."""
    least = sizes.kthvalue(len(sizes) - count + 1).values
    above = (sizes > least).nonzero()[:, 0]
    equal = (sizes == least).nonzero()[: count - len(above), 0]
    return torch.cat([above, equal]).sort().values


def packed(places: Tensor, numbers: int) -> Tensor:
    """Return places among so many numbers in as few bytes as fit: whole numbers, or one bit for each number."""
    kind = next(kind for kind, limit in INTEGERS if numbers <= limit)
    if -(-numbers // 8) > len(places) * kind.itemsize:
        return places.to(kind)
    bits = torch.zeros(-(-numbers // 8) * 8, dtype=torch.uint8)
    bits[places] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked(code: Tensor, numbers: int, count: int) -> Tensor:
    """Undo `packed`; raise RunError for places that are not `count` different ones, in order."""
    kind = next(kind for kind, limit in INTEGERS if numbers <= limit)
    if -(-numbers // 8) > count * kind.itemsize:
        places = code.to(torch.int64)
    else:
        places = ((code.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1).nonzero()[:, 0]
    if len(places) != count or places[0] < 0 or places[-1] >= numbers or bool((places.diff() <= 0).any()):
        raise RunError("a message is damaged: its places are not those of different numbers, in order")
    return places
