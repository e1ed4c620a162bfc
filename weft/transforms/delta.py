"""delta: what travels is the difference to what the client started from, and not the adapter itself.

The server adds the start back to the mean, w + sum_k p_k (w_k - w). A client subtracts what it received, and the server
adds what it sent: where that was rounded on the way down, the server keeps its own exact w, and steps that are smaller
than the rounding add up there, as with error feedback. Without it there is nothing small to clip or to
leave out. What the algorithm calls a start (`origin`) is subtracted tensor by tensor; all other parts of an update are
differences already, such as scaffold's change of a control variate, and pass as they are.
"""

from dataclasses import replace

from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import At, Parcel, Tally, Total, Transform, Wire


def delta() -> Transform:
    """Send differences to what was received."""

    def client(at: At, parcel: Parcel) -> Parcel:
        return replace(parcel, update=trees.moved(parcel.update, at.received, -1.0))

    def server(total: Total, tally: Tally) -> Total:
        assert isinstance(total, dict)
        return trees.moved(total, tally.sent, 1.0)

    return Transform(check=_check, client=client, server=server)


def _check(wire: Wire) -> Wire:
    if wire.delta:
        raise JobError("a second delta would subtract what was sent twice; keep one")
    if wire.encoded:
        raise JobError(f"{wire.encoded} leaves codes, and no numbers to subtract from; put delta before it")
    if wire.weighted:
        raise JobError("what was sent is added to the mean and not to the sum; put delta before weigh")
    return replace(wire, delta=True)
