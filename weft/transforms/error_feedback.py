"""Error feedback: what an encoding left out stays at the client and is added to its next update.

p = e + D; send c(p); e = p - c(p). So the sum of all that was sent, and e, is the sum of all updates: nothing is lost,
only late. Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, arXiv:1901.09847. The server
names the round whose memory counts, so a lost reply or a stop takes nothing away and counts nothing twice.
"""

from collections.abc import Callable
from dataclasses import replace

from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import At, Parcel, State, Wire

Code = Callable[[At, State], State]


def coding(encode: Code, decode: Code, feedback: bool) -> Callable[[At, Parcel], Parcel]:
    """Return the client half of an encoding, with error feedback or without."""

    def client(at: At, parcel: Parcel) -> Parcel:
        if not feedback:
            return replace(parcel, update=encode(at, parcel.update))
        whole = trees.moved(parcel.update, parcel.kept, 1.0)
        codes = encode(at, whole)
        left = trees.moved(whole, decode(replace(at, form=whole), codes), -1.0)
        # What is not in this update, such as the factor that rests in this round, keeps what it has.
        kept = {part: {**parcel.kept.get(part, {}), **left.get(part, {})} for part in parcel.kept.keys() | left.keys()}
        return replace(parcel, update=codes, kept=kept)

    return client


def unbounded(wire: Wire, feedback: bool) -> Wire:
    """Return what is known after error feedback: what is sent may be longer than one update."""
    if feedback and wire.noise:
        raise JobError("error feedback sends more than clip allows, which noise is scaled by; set feedback to false")
    return replace(wire, norm=None) if feedback else wire


def differences(wire: Wire) -> None:
    """Refuse where numbers that are left out would not mean `no change`."""
    if wire.down:
        raise JobError("it needs a difference, and the server sends the adapter itself; leave it out of downlink")
    if wire.encoded:
        raise JobError(f"{wire.encoded} leaves codes; put it before {wire.encoded}, or leave one of them out")
    if not wire.delta:
        raise JobError("what is left out must mean no change, so it needs differences; put delta before it")
