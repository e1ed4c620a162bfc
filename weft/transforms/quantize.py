"""quantize: each number in 16, 8 or 4 bits, with one scale for each block of a tensor.

    16      bfloat16, no scale
    8, 4    code times scale, code in -127..127 or -7..7 (two codes a byte)
    4       `levels: normal`: the 16 levels of NF4, times the block's largest magnitude (Dettmers et al. 2023,
            "QLoRA", arXiv:2305.14314, appendix E)

Nearest rounding is off by half a step at most and finds its own results again; stochastic rounding is right on average,
with draws at the address of seed, round and client. Alistarh et al. 2017, "QSGD", arXiv:1610.02132; Reisizadeh et al.
2020, "FedPAQ", arXiv:1909.13014, which codes the difference (put delta before). Scales are bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from weft.core import keys, trees
from weft.core.errors import JobError
from weft.core.types import At, State, Transform, Wire
from weft.transforms.error_feedback import coding, unbounded

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
Draw = Callable[[tuple[int, ...]], Tensor]
"""Shape -> uniform numbers in [0, 1), float64."""


@dataclass(frozen=True)
class Grid:
    """How numbers become codes."""

    bits: int
    normal: bool
    block: int
    draw: Draw | None
    """None: round to the nearest."""

    @property
    def top(self) -> int:
        """Return the code of the largest number of a block."""
        return 1 if self.normal else 2 ** (self.bits - 1) - 1


def quantize(
    bits: Literal[16, 8, 4] = 8,
    levels: Literal["even", "normal"] = "even",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    block: Annotated[int, Field(ge=8, le=65536)] = 64,
    feedback: bool = False,
) -> Transform:
    """Send numbers in fewer bits.

    bits: of each number. levels: `normal` for NF4, with 4 bits. rounding: `stochastic` is right on average.
    block: numbers that share a scale. feedback: add what rounding took away to the next update.
    """

    def encode(at: At, update: State) -> State:
        generator = keys.generator(at.seed, at.round, at.client, "quantize")

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        return encoded(update, Grid(bits, levels == "normal", block, draw if rounding == "stochastic" else None))

    def decode(at: At, update: State) -> State:
        return decoded(update, at.form, Grid(bits, levels == "normal", block, None))

    def check(wire: Wire) -> Wire:
        if levels == "normal" and bits != 4:
            raise JobError("the normal levels are 16, which are 4 bits; set bits to 4")
        if wire.encoded in ("quantize", "zstd"):
            raise JobError(f"{wire.encoded} left codes, and there are no numbers to round; leave one of them out")
        if wire.encoded and feedback:
            raise JobError(f"the places of {wire.encoded} change from round to round; set quantize's feedback to false")
        return replace(unbounded(wire, feedback), encoded="quantize")

    return Transform(check=check, client=coding(encode, decode, feedback), arrive=decode, remembers=feedback)


def encoded(state: State, grid: Grid) -> State:
    """Return codes and scales of all floats, one after the other; whole numbers stay as they are."""
    floats, others = _sorted(state)
    if not floats:
        return state
    pairs = [_codes(tensor.reshape(-1), grid) for tensor in trees.flatten(floats).values()]
    codes = torch.cat([codes for codes, _ in pairs])
    if grid.bits == 16:
        return others | {"quantize": {"codes": codes}}
    scales = torch.cat([scales for _, scales in pairs])
    return others | {"quantize": {"codes": nibbles(codes) if grid.bits == 4 else codes, "scales": scales}}


def decoded(update: State, form: State, grid: Grid) -> State:
    """Undo `encoded`, but for the rounding."""
    floats, others = _sorted(form)
    if not floats:
        return update
    sizes = [tensor.numel() for tensor in trees.flatten(floats).values()]
    codes = update["quantize"]["codes"]
    if grid.bits == 16:
        vector = codes.float()
    else:
        codes = unnibbled(codes, sum(sizes), grid.normal) if grid.bits == 4 else codes
        counts = [-(-size // grid.block) for size in sizes]
        scales = update["quantize"]["scales"].float().split(counts)
        pieces = zip(codes.split(sizes), scales, strict=True)
        vector = torch.cat([_numbers(code, scale, grid) for code, scale in pieces])
    result = trees.parted(vector, floats)
    for part, tree in others.items():
        result[part] = result.get(part, {}) | {name: update[part][name] for name in tree}
    return {part: dict(sorted(tree.items())) for part, tree in sorted(result.items())}


def _sorted(state: State) -> tuple[State, State]:
    """Return the floats, and the tensors that are whole numbers."""
    flat = trees.flatten(state)
    return (
        trees.unflatten({name: tensor for name, tensor in flat.items() if tensor.is_floating_point()}),
        trees.unflatten({name: tensor for name, tensor in flat.items() if not tensor.is_floating_point()}),
    )


def _codes(vector: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the codes of a vector, and the scales of its blocks."""
    if grid.bits == 16:
        return _halved(vector, grid.draw), torch.zeros(0)
    size = len(vector)
    rows = torch.nn.functional.pad(vector, (0, -size % grid.block)).view(-1, grid.block).double()
    scales = _scale(rows.abs().amax(1) / grid.top, up=grid.draw is not None)
    rows = torch.where(scales[:, None] > 0, rows / scales[:, None].double(), 0.0)
    codes = _level(rows, grid.draw) if grid.normal else _whole(rows, grid)
    return codes.reshape(-1)[:size], scales


def _scale(exact: Tensor, up: bool) -> Tensor:
    """Return scales as bfloat16: the nearest, so that the largest number gets the largest code and finds it again.

    up: none below the exact one, which would cut the largest number off, so that rounding is right on average.
    """
    scales = exact.to(torch.bfloat16)
    if not up:
        return scales
    higher = (scales.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(scales.double() < exact, higher, scales)


def _whole(rows: Tensor, grid: Grid) -> Tensor:
    rounded = rows.round() if grid.draw is None else (rows + grid.draw(tuple(rows.shape))).floor()
    return rounded.clamp(-grid.top, grid.top).to(torch.int8)


def _level(rows: Tensor, draw: Draw | None) -> Tensor:
    levels = torch.tensor(NF4, dtype=torch.float64)
    if draw is None:
        return torch.bucketize(rows, (levels[1:] + levels[:-1]) / 2).to(torch.int8)
    below = (torch.searchsorted(levels, rows, right=True) - 1).clamp(0, len(levels) - 2)
    part = (rows - levels[below]) / (levels[below + 1] - levels[below])
    return (below + (draw(tuple(rows.shape)) < part)).to(torch.int8)


def _numbers(codes: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    values = torch.tensor(NF4)[codes.long()] if grid.normal else codes.float()
    return values * scales.repeat_interleave(grid.block)[: len(codes)]


def _halved(vector: Tensor, draw: Draw | None) -> Tensor:
    """Return bfloat16, which is the upper half of a float32."""
    if draw is None:
        return vector.to(torch.bfloat16)
    lower = (draw(tuple(vector.shape)) * 2**16).to(torch.int32)
    return ((vector.contiguous().view(torch.int32) + lower) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def nibbles(codes: Tensor) -> Tensor:
    """Return codes of four bits as bytes, two each, the first in the lower half; -7..7 as its last four bits."""
    pairs = torch.nn.functional.pad(codes.view(torch.uint8) & 15, (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unnibbled(content: Tensor, size: int, plain: bool) -> Tensor:
    """Undo `nibbles`; plain: the codes are 0..15."""
    codes = torch.stack([content & 15, content >> 4], 1).reshape(-1)[:size].to(torch.int8)
    return codes if plain else torch.where(codes > 7, codes - 16, codes)
