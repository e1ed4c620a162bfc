"""zstd: bit for bit, in fewer bytes, never more than was announced."""

import pytest
import torch
import zstandard

from weft.core import coding, trees
from weft.core.errors import JobError, RunError
from weft.core.types import At, Parcel, State, Wire
from weft.testing import toys
from weft.testing.sound import bits
from weft.transforms.quantize import quantize
from weft.transforms.zstd import zstd

AT = At(7, 1, "a")
GIVEN: State = {
    "adapter": {"empty": torch.zeros(0, 3), "v": toys.draw((50,), "v"), "z": torch.zeros(40, 25)},
    "codes": {"b": toys.draw((9,), "b").bfloat16(), "p": torch.arange(3).to(torch.uint16)},
}
STEPS = [("zstd", zstd())]


def packed(state: State = GIVEN) -> State:
    return coding.encode(STEPS, AT, Parcel(state, 1), state).update


def as_code(content: bytes) -> State:
    return {"zstd": {"zstd": torch.tensor(list(content), dtype=torch.uint8)}}


def test_there_and_back_bit_for_bit() -> None:
    """4000 bytes of zeros and 224 others fit in less than 400; no name and no shape travels."""
    sent = packed()
    assert list(trees.flatten(sent)) == ["zstd/zstd"]
    assert sent["zstd"]["zstd"].numel() < 400
    assert bits(coding.decode(STEPS, AT, sent, GIVEN)) == bits(GIVEN)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    """A gigabyte of zeros in 33 kB: its frame says how much it is, and nothing is unpacked."""
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 30))
    assert len(bomb) < 1 << 16
    with pytest.raises(RunError, match="does not unpack to 4224 bytes"):
        coding.decode(STEPS, AT, as_code(bomb), GIVEN)


def test_a_frame_that_hides_its_size_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4224))
    with pytest.raises(RunError, match="does not unpack to 4224 bytes"):
        coding.decode(STEPS, AT, as_code(hidden), GIVEN)


@pytest.mark.parametrize("content", [b"", b"x", b"\x28\xb5\x2f\xfd" + bytes(20)])
def test_damage_is_refused(content: bytes) -> None:
    with pytest.raises(RunError, match="a message is damaged"):
        coding.decode(STEPS, AT, as_code(content), GIVEN)


def test_cut_and_lengthened_frames_are_refused() -> None:
    whole = packed()["zstd"]["zstd"].numpy().tobytes()
    for content in (whole[:-1], whole + b"x", whole + whole):
        with pytest.raises(RunError, match="a message is damaged"):
            coding.decode(STEPS, AT, as_code(content), GIVEN)


def test_it_comes_last() -> None:
    assert zstd().check(quantize().check(Wire())).encoded == "zstd"
    with pytest.raises(JobError, match="keep one zstd"):
        zstd().check(Wire(encoded="zstd"))
    with pytest.raises(JobError, match="zstd left codes"):
        quantize().check(Wire(encoded="zstd"))
