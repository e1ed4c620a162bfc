"""ring: a clipped difference as one vector of integers mod 2^32, which sums exactly and can be masked.

The numbers, the weight and the training loss travel in one vector (`weft/core/ring.py` has the form and the bounds),
four bytes a parameter. With or without `mask` after it the result is the same, bit for bit.
"""

from dataclasses import replace

from weft.core.errors import JobError
from weft.core.ring import MOST_WEIGHT, RingSum, code, encode
from weft.core.types import At, Parcel, Tally, Total, Transform, Wire


def ring() -> Transform:
    """Send integers mod 2^32."""

    def client(at: At, parcel: Parcel) -> Parcel:
        known = code(at.wire, len(at.cohort))
        vector = encode(parcel.update, parcel.weight, parcel.metrics.get("loss"), known)
        return replace(parcel, update={"ring": {"vector": vector}})

    def server(total: Total, tally: Tally) -> Total:
        assert isinstance(total, RingSum)
        return total.divided()

    return Transform(check=_check, client=client, server=server)


def _check(wire: Wire) -> Wire:
    if wire.encoded not in ("", "random_mask"):
        raise JobError(
            f"{wire.encoded} leaves codes of each client's own, which do not add up in a ring; leave {wire.encoded} "
            "out: the ring is an encoding itself (for fewer numbers: random_mask, the same ones at every client)"
        )
    if wire.noise:
        raise JobError("a ring holds integers, which `noise` is not for; use discrete_noise between ring and mask")
    if not wire.delta or wire.norm is None:
        raise JobError("only a difference of a known length fits into a ring; put delta and clip before it")
    if wire.length is not None:
        raise JobError(
            "clip counts the updates that are short enough beside them, which a ring and a mask would have to hide as "
            "well; leave clip.quantile out"
        )
    if not wire.weighted or wire.heaviest is None:
        raise JobError("the weight travels inside the ring; put weigh before it")
    if wire.heaviest > MOST_WEIGHT:
        raise JobError(
            f"weigh.cap is {wire.heaviest}, and an update is scaled by its weight over this cap, which would leave it "
            f"few bits; set weigh: {{cap: N}}, N about the examples of the largest client and at most {MOST_WEIGHT}"
        )
    return replace(wire, ring=True, encoded="ring")
