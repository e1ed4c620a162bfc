"""noise: Gaussian noise on the sum of all clients' clipped updates, before it is divided.

Standard deviation multiplier * norm * w, with the norm of clip and the most, w, that one client counts for in weigh.
Where clip adapts its length, the count that it goes by is a release of its own; then the updates get somewhat more, so
that the multiplier holds for both together (`for_updates`).
McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", arXiv:1710.06963. The server adds it,
so it protects from who gets the adapter and not from the server.

Drawn from the run's private secret, never from the job's seed, which is public; by SHAKE-256 over the secret, the round
and the sum itself, so that a round that is repeated gives the same bytes only where the sum is the same, and otherwise
noise that has nothing to do with the first. Four normal numbers make one, so that the last bits of floating point tell
little of it (Holohan and Braghin 2021, arXiv:2107.10138); what leaves is rounded to multiples of 2^-80.
"""

import hashlib
import math
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.core.errors import JobError, RunError
from weft.core.sums import Sum
from weft.core.trees import flatten
from weft.core.types import Tally, Total, Transform, Wire

MOST = 2.0**11  # of the standard deviation: 16 of them stay below what a sum can hold
UNSET = 2**20  # weigh's cap where none is given


def noise(multiplier: Annotated[float, Field(gt=0)]) -> Transform:
    """Add Gaussian noise to the sum.

    multiplier: standard deviation over the most that one client can change the sum by.
    """

    def check(wire: Wire) -> Wire:
        _check(wire)
        if for_updates(multiplier, wire) * (wire.norm or 0) * (wire.heaviest or 0) >= MOST:
            raise JobError(
                f"noise of {multiplier} times what a client adds is more than a sum can hold; lower clip.norm"
            )
        return replace(wire, noise=multiplier)

    def server(total: Total, tally: Tally) -> Total:
        assert isinstance(total, Sum)
        if not tally.secret or not tally.wire.norm or not tally.wire.heaviest:
            raise RunError("noise has no secret to be drawn from, or no bound to be scaled by")
        deviation = for_updates(multiplier, tally.wire) * tally.wire.norm * tally.wire.heaviest
        return noisy(total, deviation, tally.secret, tally.round)

    return Transform(check=check, server=server)


def _check(wire: Wire) -> None:
    if wire.ring:
        raise JobError("a ring holds integers, which this noise is not for; use discrete_noise between ring and mask")
    if wire.noise:
        raise JobError("a second noise; keep one, with the multiplier that is wanted")
    if wire.norm is None:
        raise JobError("nothing bounds what one client adds; put clip before it, and no error feedback between them")
    if not wire.weighted:
        raise JobError("it belongs to the sum, before the division by all weights; put weigh before it")
    if not wire.uniform and wire.heaviest in (None, UNSET):
        raise JobError("one client may count for any number of examples; set weigh.by to uniform, or weigh.cap")


def for_updates(multiplier: float, wire: Wire) -> float:
    """Return z_D = (z^-2 - (2 spread)^-2)^-1/2, the multiplier of the updates' noise; raise JobError for no spread.

    A client changes the sum of updates by C, with noise z_D C, and the number of short ones by a half either way (1/2
    is taken from each bit, and the number of clients is public), with noise `spread`. Two Gaussian releases together
    are one of multiplier z where 1/z^2 = 1/z_D^2 + 1/(2 spread)^2. Andrew et al. 2021, theorem 1.

    >>> round(for_updates(1.0, Wire(length=1.0, spread=2.5)), 6), for_updates(1.0, Wire())
    (1.020621, 1.0)
    """
    if wire.length is None:
        return multiplier
    if 2 * wire.spread <= multiplier:
        raise JobError(
            f"clip.quantile goes by a count with noise of {wire.spread:g} clients, and to hold noise of {multiplier:g} "
            f"for that as well it must be more than {multiplier / 2:g}; set clip.spread higher"
        )
    return float((multiplier**-2 - (2 * wire.spread) ** -2) ** -0.5)


def noisy(total: Sum, deviation: float, secret: bytes, number: int) -> Sum:
    """Return the sum with noise of this standard deviation; the given sum stays as it is."""
    digest = hashlib.sha256()
    for name, limbs in flatten(total.limbs).items():
        digest.update(f"{name} {tuple(limbs.shape)};".encode() + limbs.contiguous().numpy().tobytes())
    drawn, result = Sum(), Sum()
    for part, tree in total.limbs.items():
        for name, limbs in tree.items():
            key = b"\0".join(
                (b"weft noise 1", secret, str(number).encode(), digest.digest(), f"{part}/{name}".encode())
            )
            values = normal(limbs[0].numel(), key).view(limbs.shape[1:]) * deviation
            one = Sum()
            one.add({part: {name: values}}, 1)
            drawn.merge(one)
    drawn.weight = 0
    result.merge(total)
    result.merge(drawn)
    return result


def normal(count: int, key: bytes) -> Tensor:
    """Return standard normal numbers, float64, each a sum of four by Box and Muller; the key decides all of them."""
    stream = hashlib.shake_256(key).digest(count * 4 * 8)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
    uniform = ((words >> 11) & (2**53 - 1)).double().add(0.5).mul(2.0**-53).view(2, 2, count)  # in (0, 1)
    radius, angle = (-2 * uniform[0].log()).sqrt(), 2 * math.pi * uniform[1]
    four: Tensor = radius * angle.cos() + radius * angle.sin()
    return four.sum(0) / 2
