"""zstd: the bytes of all tensors, packed without loss; the last step before the wire.

RFC 8878. Names and shapes do not travel: the other end knows them. It knows as well how many bytes must come out, and
refuses a message that says another number before it unpacks anything.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.core.types import At, Parcel, State, Transform, Wire

WIDEST = 2**27  # bytes that unpacking may look back


def zstd(level: Annotated[int, Field(ge=1, le=22)] = 3) -> Transform:
    """Pack the bytes of a message.

    level: 1 is fast, 22 is small.
    """

    def client(at: At, parcel: Parcel) -> Parcel:
        import zstandard

        content = b"".join(_bytes(tensor) for tensor in trees.flatten(parcel.update).values())
        packed = zstandard.ZstdCompressor(level=level).compress(content)
        code = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        return replace(parcel, update={"zstd": {"zstd": code}} if content else parcel.update)

    def check(wire: Wire) -> Wire:
        if wire.encoded == "zstd":
            raise JobError("what is packed does not get smaller; keep one zstd")
        return replace(wire, encoded="zstd")

    return Transform(check=check, client=client, arrive=_unpacked, varies=True)


def _unpacked(at: At, update: State) -> State:
    form = trees.flatten(at.form)
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in form.items()}
    if not sum(sizes.values()):
        return update
    content = _content(update["zstd"]["zstd"].numpy().tobytes(), sum(sizes.values()))
    result, start = {}, 0
    for name, tensor in form.items():
        piece = bytearray(content[start : start + sizes[name]])
        empty = torch.zeros(0, dtype=tensor.dtype)
        result[name] = (torch.frombuffer(piece, dtype=tensor.dtype) if piece else empty).view(tensor.shape)
        start += sizes[name]
    return trees.unflatten(result)


def _content(packed: bytes, size: int) -> bytes:
    """Return exactly so many bytes, or raise RunError before there are more."""
    import zstandard

    try:
        if zstandard.frame_content_size(packed) != size:
            raise RunError(f"a message is damaged: it does not unpack to {size} bytes")
        content: bytes = zstandard.ZstdDecompressor(max_window_size=WIDEST).decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RunError(f"a message is damaged: {error}") from None
    if len(content) != size:
        raise RunError(f"a message is damaged: it does not unpack to {size} bytes")
    return content


def _bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content
