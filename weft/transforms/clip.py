"""clip: no client adds more than a vector of length `norm`, over all its tensors and parts together.

u <- u min(1, norm / |u|). One length for everything: limits of each tensor would allow their root of squares together.
McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (flat clipping). The client shortens
its update, and the server again what it decodes, so that neither rounding nor a dishonest client adds more; where
secure aggregation hides replies, the server has the clients' word alone.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import At, Parcel, State, Transform, Wire

BELOW = 1 - 2.0**-23  # rounding to float32 lengthens by a part of 2^-24 at most; so it stays below the norm


def clip(norm: Annotated[float, Field(gt=0)]) -> Transform:
    """Shorten each update to a length.

    norm: the largest joint L2 norm of a client's update, all tensors and parts together.
    """

    def check(wire: Wire) -> Wire:
        if wire.encoded:
            raise JobError(f"{wire.encoded} leaves codes, which have no length; put clip before it")
        if wire.down:
            raise JobError(
                "it shortens a difference, and the server sends the adapter itself; leave it out of downlink"
            )
        if not wire.delta:
            raise JobError("without delta the adapter itself would be shortened, not its change; put delta before clip")
        if wire.noise:
            raise JobError("noise is scaled by the length that clip allows; put clip before noise")
        return replace(wire, norm=norm if wire.norm is None else min(norm, wire.norm))

    def client(at: At, parcel: Parcel) -> Parcel:
        return replace(parcel, update=shortened(parcel.update, norm))

    def arrive(at: At, update: State) -> State:
        return shortened(update, norm)

    return Transform(check=check, client=client, arrive=arrive)


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
