"""Messages as bytes: every kind of value comes back bit for bit, and damage anywhere is refused in words."""

import math
import random
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.errors import RunError
from weft.links import wire
from weft.testing.sound import bits

TREE: dict[str, Any] = {
    "bf16": torch.tensor([[1.5, -0.0], [3e38, 1e-30]]).bfloat16(),
    "half": torch.tensor([1.0, math.nan]).half(),
    "codes": torch.tensor([[-128, 127]], dtype=torch.int8),
    "large": torch.tensor([2**62, -1]),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(2.0),
    "rows": [1, 2.5, -0.0, None, True, "é\n", b"", b"\x00\xff", ("a", (1,)), {"deep": [[]]}],
    "odd": [math.nan, math.inf, -math.inf, 1e-320, 2**70],
}


def test_every_value_comes_back_bit_for_bit() -> None:
    back = wire.unseal(wire.seal(TREE))
    assert repr(back.pop("odd")) == repr(TREE["odd"])  # nan is no equal of itself
    assert bits(back) == bits({name: value for name, value in TREE.items() if name != "odd"})


def test_the_same_tree_gives_the_same_bytes() -> None:
    assert wire.seal(TREE) == wire.seal(wire.unseal(wire.seal(TREE)))


def test_tensors_that_share_storage_come_back_apart() -> None:
    base = torch.arange(6.0)
    back = wire.unseal(wire.seal({"a": base, "b": base, "t": base.view(2, 3).T}))
    assert torch.equal(back["a"], base)
    assert torch.equal(back["t"], base.view(2, 3).T)
    back["a"][0] = 9
    assert back["b"][0] == 0


def test_the_size_can_be_counted_by_hand() -> None:
    """4 + 4 + 8 + 8 = 24 bytes of frame, a head of {"a":1} = 7 bytes, an empty body: safetensors writes 8 + 8 bytes."""
    content = wire.seal({"a": 1})
    assert content[24:31] == b'{"a":1}'
    assert struct.unpack_from("<4sIQQ", content) == (b"WEFT", 2, 7, len(content) - 31)


def test_sealed_for_each_is_sealed_one_by_one() -> None:
    shared = wire.share({"x": TREE["bf16"]})
    for to in (["p"], []):
        content = shared.front({"to": to}) + shared.body
        assert bits(wire.unseal(content)) == bits({"x": TREE["bf16"], "to": to})
        assert content == wire.seal({"x": TREE["bf16"], "to": to})


def test_what_is_mostly_zeros_travels_without_them() -> None:
    """1,000 numbers, 10 of them no zero: 4,000 bytes become 125 of bits, 9 of the shape, 40 of values, and names."""
    sparse = torch.zeros(1000)
    sparse[::100] = -0.0
    sparse[5::100] = 1.5
    content = wire.seal({"w": sparse})
    assert len(content) < 500
    assert bits(wire.unseal(content)) == bits({"w": sparse})


@pytest.mark.parametrize("value", [object(), {1: "a"}, {"$": 1}, {"a": {2}}, {"a": 1j}])
def test_what_no_message_holds_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="a message cannot hold"):
        wire.seal(value)


def test_another_version_is_named() -> None:
    content = bytearray(wire.seal({"a": 1}))
    content[4] = 9
    with pytest.raises(RunError, match="format 9, and this Weft reads 2"):
        wire.unseal(bytes(content))


def test_a_size_that_is_not_the_stated_one_is_refused_before_anything_is_parsed() -> None:
    content = wire.seal(TREE)
    for wrong in (content[:-1], content + b"\0", content[:24], b""):
        with pytest.raises(RunError, match=r"damaged: it (has|does not begin)"):
            wire.unseal(wrong)


def test_a_head_that_points_nowhere_or_leaves_a_tensor_is_refused() -> None:
    front = wire.share({"x": torch.ones(2)}).front({"a": 1})
    nothing = wire.seal({})[24 + 2 :]
    head = front[24:]
    frame = struct.pack("<4sIQQ", b"WEFT", 2, len(head), len(nothing))
    with pytest.raises(RunError, match="points nowhere"):
        wire.unseal(frame + head + nothing)
    body = wire.share({"x": torch.ones(2)}).body
    with pytest.raises(RunError, match="nothing refers to its tensor"):
        wire.unseal(struct.pack("<4sIQQ", b"WEFT", 2, 2, len(body)) + b"{}" + body)


def test_a_nest_without_end_is_refused() -> None:
    with pytest.raises(RunError, match="nested deeper"):
        wire.unseal(wire.seal(_nested(40)))


def _nested(levels: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(levels):
        tree = [tree]
    return tree


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6))
def test_damage_anywhere_gives_our_error_or_another_tree_and_nothing_else(seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(wire.seal({"a": torch.arange(4.0), "b": [b"xyz", {"c": 1.5}]}))
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    try:
        wire.unseal(bytes(content))
    except RunError:
        return
