"""mask: secure aggregation, so that the server learns the sum of a round and no client's own update.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", full graph, double masks.
This step adds the masks; the site agrees on keys and answers for them (`weft/secure/`). What leaves a client is one
uniformly random vector: its weight and its loss are summed inside, and nothing else is told.
"""

from dataclasses import replace

from weft.core.errors import JobError, RunError
from weft.core.types import At, Parcel, Transform, Wire


def mask() -> Transform:
    """Hide each update in the sum of all."""

    def client(at: At, parcel: Parcel) -> Parcel:
        if at.hide is None:
            raise RunError("this client agreed on no keys in this round, and nothing leaves it unmasked")
        hidden = at.hide(parcel.update["ring"]["vector"])
        return replace(parcel, update={"ring": {"vector": hidden}}, weight=1, examples=0, metrics={})

    return Transform(check=_check, client=client)


def _check(wire: Wire) -> Wire:
    if not wire.ring or wire.encoded not in ("ring", "discrete_noise", "mask"):
        raise JobError("masks are added to integers of a ring; put ring right before it")
    if wire.hidden:
        raise JobError("a second mask hides nothing more; keep one")
    return replace(wire, hidden=True, encoded="mask")
