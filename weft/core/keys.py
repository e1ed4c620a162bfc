"""Every random draw has an address: the job's public seed, then words and numbers that say what is drawn.

The same address gives the same draw on every machine, in any order and after any restart, so no generator
is ever saved. Nothing secret may come from the seed, which is public: `secret` takes a private one.
"""

import hashlib
import hmac
import json
from collections.abc import Sequence

import torch


def number(seed: int, *address: str | int) -> int:
    """Return the 63-bit integer at an address.

    >>> number(7, 1, "clinic", "batches") == number(7, 1, "clinic", "batches")
    True
    >>> number(7, 1, "clinic", "batches") == number(7, 2, "clinic", "batches")
    False
    """
    text = json.dumps(["weft", seed, *address], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *address: str | int) -> torch.Generator:
    """Return a fresh CPU generator for an address."""
    return torch.Generator().manual_seed(number(seed, *address))


def normal(shape: Sequence[int], seed: int, *address: str | int) -> torch.Tensor:
    """Return standard normal numbers of a shape, drawn at an address."""
    return torch.randn(tuple(shape), generator=generator(seed, *address))


def permutation(length: int, seed: int, *address: str | int) -> list[int]:
    """Return 0..length-1 in the order that the address draws."""
    order: list[int] = torch.randperm(length, generator=generator(seed, *address)).tolist()
    return order


def secret(private: bytes, *address: str | int) -> bytes:
    """Return 32 bytes that belong to an address and that only who knows `private` can tell from random ones."""
    text = json.dumps(["weft", *address], separators=(",", ":"))
    return hmac.new(private, text.encode(), hashlib.sha256).digest()
