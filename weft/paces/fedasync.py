"""fedasync: the server moves towards each client's adapter as soon as it arrives.

w <- (1 - a) w + a w_k with a = mix s(t - v), v the state that client k began with. Xie et al. 2019, arXiv:1903.03934.
The client's adapter and not its difference to where it began, so an old one pulls back as well; with mix 1 and no
staleness the server takes it as it is. Who is at work is as in fedbuff. A round is one reply.
"""

from typing import Annotated

from pydantic import Field

from weft.core.pace import Pace
from weft.paces.staleness import Kind, staleness_factor


def fedasync(
    mix: Annotated[float, Field(gt=0, le=1)] = 0.6,
    staleness: Kind = "polynomial",
    exponent: Annotated[float, Field(ge=0)] = 0.5,
) -> Pace:
    """Step after every reply.

    mix: the part of a fresh adapter in the next state. staleness, exponent: as in fedbuff.
    """
    return Pace(1, staleness_factor(staleness, exponent, mix), from_start=False)
