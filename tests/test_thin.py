"""Tensors that are mostly zeros: the same bits after the wire, fewer bytes on it, damage named."""

import pytest
import torch

from weft.core.errors import RunError
from weft.links import wire
from weft.links.thin import BITS, VALUES, thick, thin
from weft.testing.sound import bits


def sparse(kept: int, shape: tuple[int, ...] = (16, 64)) -> torch.Tensor:
    value = torch.zeros(shape)
    value.view(-1)[torch.arange(kept) * (value.numel() // max(kept, 1))] = torch.arange(1.0, kept + 1)
    return value


def test_bytes_by_hand() -> None:
    """1024 numbers of which 256 are no zero: 1024 / 8 bits, 1 + 2 * 8 bytes of shape, 4 * 256: 1169 of 4096 bytes."""
    parts = thin({"w": sparse(256)})
    assert sum(part.numel() * part.element_size() for part in parts.values()) == 128 + 17 + 1024
    assert set(parts) == {"w" + BITS, "w" + VALUES}


@pytest.mark.parametrize("kept", [0, 1, 511, 512, 513, 1024])
@pytest.mark.parametrize("shape", [(1024,), (16, 64), (4, 16, 16)])
def test_the_same_bits_come_back(kept: int, shape: tuple[int, ...]) -> None:
    value = sparse(kept, shape)
    value.view(-1)[1] = -0.0  # no zero by its bits
    state = {"part": {"w": value, "small": torch.zeros(5), "whole": torch.arange(300)}}
    assert bits(wire.unpack(wire.pack(state))) == bits(state)


def test_where_less_than_half_is_zero_nothing_changes() -> None:
    dense = {"w": torch.ones(1024)}
    assert thin(dense) == dense
    assert len(wire.pack({"p": {"w": sparse(100)}})) < 0.2 * len(wire.pack({"p": dense}))


def test_a_float_that_is_odd_long_is_exact() -> None:
    value = torch.zeros(1003)
    value[-1] = float("nan")
    assert bits(thick(thin({"w": value}))) == bits({"w": value})


def damage(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = thin({"w": sparse(7)})
    if value is None:
        del parts[name]
        return parts
    return parts | {name: value}


HUGE = torch.tensor([1, *[255] * 7, 127, 0], dtype=torch.uint8)
NEGATIVE = torch.tensor([1, *[255] * 8, 0], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("w" + VALUES, None),
        ("w" + BITS, None),
        ("w" + VALUES, torch.ones(6)),
        ("w" + VALUES, torch.ones(7, dtype=torch.int64)),
        ("w" + BITS, torch.zeros(0, dtype=torch.uint8)),
        ("w" + BITS, torch.tensor([9, 1], dtype=torch.uint8)),
        ("w" + BITS, HUGE),
        ("w" + BITS, NEGATIVE),
        ("w" + BITS, torch.zeros(3)),
    ],
)
def test_damage_is_named(name: str, value: torch.Tensor | None) -> None:
    with pytest.raises(RunError, match="a message is damaged"):
        thick(damage(name, value))
