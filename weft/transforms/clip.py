"""clip: no client adds more than a vector of length `norm`, over all its tensors and parts together.

u <- u min(1, norm / |u|). One length for everything: limits of each tensor would allow their root of squares together.
McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (flat clipping). The client shortens
its update, and the server again what it decodes, so that neither rounding nor a dishonest client adds more; where
secure aggregation hides replies, the server has the clients' word alone.

With `quantile` the length C follows the updates (Andrew et al. 2021, "Differentially Private Learning with Adaptive
Clipping"): each client tells b = 1 where its update is no longer than C, and after the round
C <- C exp(-rate (share - quantile)) with share = (sum b + N(0, spread^2)) / clients, so that C falls while too many are
short. The count is released beside the updates; `noise` pays for it, so that its multiplier holds for both.
"""

import math
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.core.length import SHORT
from weft.core.types import Adapts, At, Parcel, State, Tally, Transform, Wire
from weft.transforms.noise import normal

BELOW = 1 - 2.0**-23  # rounding to float32 lengthens by a part of 2^-24 at most; so it stays below the norm
FAR = 2.0**40  # no length goes beyond it, nor below one over it


def clip(
    norm: Annotated[float, Field(gt=0)],
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None,
    rate: Annotated[float, Field(gt=0)] = 0.2,
    spread: Annotated[float, Field(ge=0)] = 0.0,
) -> Transform:
    """Shorten each update to a length.

    norm: the largest joint L2 norm of a client's update, all tensors and parts together; with `quantile` the first one.
    quantile: the share of updates that the length leaves as they are; 0.5: their median. null: it stays.
    rate: how fast the length follows; a share that is off by one changes it by a factor of exp(rate).
    spread: standard deviation of the noise on the number of such updates, in clients; with `noise` more than half its
    multiplier. A twentieth of a round's clients is usual.
    """

    def check(wire: Wire) -> Wire:
        _check(wire)
        if quantile is None and spread:
            raise JobError("spread is of the number that `quantile` goes by; set quantile, or leave spread out")
        if quantile is None:
            return replace(wire, norm=norm if wire.norm is None else min(norm, wire.norm))
        _check_alone(wire)
        return replace(wire, norm=norm, length=norm, spread=spread)

    def client(at: At, parcel: Parcel) -> Parcel:
        update = shortened(parcel.update, norm)
        told = {} if quantile is None else {SHORT: float(update is parcel.update)}
        return replace(parcel, update=update, metrics=parcel.metrics | told)

    def arrive(at: At, update: State) -> State:
        return shortened(update, norm)

    def after(short: int, tally: Tally) -> tuple[float, float]:
        assert quantile is not None
        share = noisy_share(short, spread, tally)
        return share, followed(norm, share, quantile, rate)

    adapts = None if quantile is None else Adapts(lambda length: clip(length, quantile, rate, spread), after)
    return Transform(check=check, client=client, arrive=arrive, adapts=adapts)


def _check(wire: Wire) -> None:
    if wire.encoded:
        raise JobError(f"{wire.encoded} leaves codes, which have no length; put clip before it")
    if wire.down:
        raise JobError("it shortens a difference, and the server sends the adapter itself; leave it out of downlink")
    if not wire.delta:
        raise JobError("without delta the adapter itself would be shortened, not its change; put delta before clip")
    if wire.noise:
        raise JobError("noise is scaled by the length that clip allows; put clip before noise")
    if wire.length is not None:
        raise JobError("a clip with quantile stands alone; keep one of the two")


def _check_alone(wire: Wire) -> None:
    if wire.norm is not None:
        raise JobError("a clip with quantile stands alone; keep one of the two")
    if wire.weighted and not wire.uniform:
        raise JobError("quantile is over clients that count alike; set weigh.by to uniform")


def shortened(update: State, norm: float) -> State:
    """Return the update, its very bits where it is short enough; lengths in float64."""
    length = trees.norm(trees.flatten(update))
    if length <= norm:
        return update
    factor = BELOW * norm / length
    return {
        part: {name: (value.double() * factor).to(value.dtype) for name, value in tree.items()}
        for part, tree in update.items()
    }


def followed(length: float, share: float, quantile: float, rate: float) -> float:
    """Return the next length: shorter where more than the quantile were short enough.

    >>> round(followed(1.0, 1.0, 0.5, 0.2), 6), round(followed(1.0, 0.0, 0.5, 0.2), 6)
    (0.904837, 1.105171)
    """
    return min(max(length * math.exp(-rate * (share - quantile)), 1 / FAR), FAR)


def noisy_share(short: int, spread: float, tally: Tally) -> float:
    """Return the share of the counted clients whose update was short enough, with noise of `spread` clients.

    The noise comes from the run's secret, the round and the numbers themselves, as that of `noise` does.
    """
    clients = len(tally.weights)
    if not spread:
        return short / clients
    if not tally.secret:
        raise RunError("the number of short updates has no secret to draw its noise from")
    words = (b"weft clip 1", tally.secret, str(tally.round).encode(), str(short).encode(), str(clients).encode())
    return (short + spread * float(normal(1, b"\0".join(words)))) / clients
