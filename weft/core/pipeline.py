"""The pipeline: checked before training, walked down at each client, walked up in reverse on the sum."""

from collections.abc import Sequence

from weft.core.errors import JobError
from weft.core.sums import Sum
from weft.core.types import At, Parcel, State, Tally, Total, Transform, Wire

Pipeline = Sequence[tuple[str, Transform]]
"""Transforms by their names, in the order in which a client applies them."""


def check(pipeline: Pipeline) -> Wire:
    """Refuse a pipeline that cannot work, with the reason; return what leaves a client."""
    wire = Wire()
    for name, transform in pipeline:
        try:
            wire = transform.check(wire)
        except JobError as error:
            raise JobError(f"pipeline: {name}: {error}") from None
    if not wire.weighted:
        raise JobError(
            "pipeline: nothing says what each client counts for, so a sum and not a mean would come out; "
            "add `weigh: {by: examples}`"
        )
    return wire


def down(pipeline: Pipeline, at: At, parcel: Parcel) -> Parcel:
    """Apply the client halves in order."""
    for _, transform in pipeline:
        parcel = transform.client(at, parcel)
    return parcel


def up(pipeline: Pipeline, total: Sum, tally: Tally) -> State:
    """Apply the server halves in reverse order."""
    result: Total = total
    for _, transform in reversed(pipeline):
        result = transform.server(result, tally)
    if isinstance(result, Sum):
        raise TypeError("the pipeline ended with an integer sum: `check` was not called")
    return result
