"""The pipeline: checked before training, walked down at each client, walked up in reverse on the sum."""

from collections.abc import Sequence
from dataclasses import replace

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
    """Apply the client halves in order, each with its own memory; the parcel's `kept` holds all of them."""
    memories: State = {}
    for i, (_, transform) in enumerate(pipeline):
        mark = _mark(i)
        own = {part.removeprefix(mark): tree for part, tree in parcel.kept.items() if part.startswith(mark)}
        after = transform.client(at, replace(parcel, kept=own))
        memories |= {mark + part: tree for part, tree in after.kept.items()}
        parcel = replace(after, kept=parcel.kept)
    return replace(parcel, kept=memories)


MEMORY = "pipeline."  # parts of a client's memory that belong to the pipeline


def _mark(place: int) -> str:
    return f"{MEMORY}{place}."


def arrive(pipeline: Pipeline, at: At, update: State) -> State:
    """Decode one client's reply, so that it can be summed."""
    for _, transform in reversed(pipeline):
        update = transform.arrive(at, update)
    return update


def up(pipeline: Pipeline, total: Sum, tally: Tally) -> State:
    """Apply the server halves in reverse order."""
    result: Total = total
    for _, transform in reversed(pipeline):
        result = transform.server(result, tally)
    if isinstance(result, Sum):
        raise TypeError("the pipeline ended with an integer sum: `check` was not called")
    return result
