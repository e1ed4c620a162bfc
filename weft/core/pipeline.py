"""The pipeline: checked before training, walked down at each client, walked up in reverse on the sum."""

from collections.abc import Sequence
from dataclasses import replace

from weft.core.errors import JobError
from weft.core.ring import RingSum
from weft.core.sums import Sum
from weft.core.types import Algorithm, At, Parcel, State, Tally, Total, Transform, Wire, whole

Pipeline = Sequence[tuple[str, Transform]]
"""Transforms by their names, in the order in which a client applies them."""

SERVER = "*"  # whose draws those on the way down are; no client has this name


def check(pipeline: Pipeline) -> Wire:
    """Refuse a pipeline that cannot work, with the reason; return what leaves a client."""
    wire = leaves(pipeline)
    if not wire.weighted:
        raise JobError(
            "pipeline: nothing says what each client counts for, so a sum and not a mean would come out; "
            "add `weigh: {by: examples}`"
        )
    return wire


def leaves(pipeline: Pipeline, wire: Wire | None = None) -> Wire:
    """Return what leaves a client; raise JobError where a step cannot stand in its place."""
    wire = wire or Wire()
    for name, transform in pipeline:
        try:
            wire = transform.check(wire)
        except JobError as error:
            raise JobError(f"pipeline: {name}: {error}") from None
    return wire


def check_algorithm(algorithm: Algorithm, pipeline: Pipeline) -> None:
    """Refuse steps that leave an algorithm without what it works on, with the reason."""
    wire = check(pipeline)
    if algorithm.combine and (wire.noise or wire.hidden):
        step = "noise" if wire.noise else "a mask"
        raise JobError(f"it needs every client's own update, and {step} is for sums; leave it out of the pipeline")
    own_ranks = algorithm.cut is not whole
    if own_ranks and wire.delta:
        raise JobError("its clients send factors of ranks of their own, which have no delta to what was sent")
    if own_ranks and any(step.remembers for _, step in pipeline):
        raise JobError(
            "its clients send factors of ranks of their own, so what was left out of one may not fit the next"
        )


def check_down(pipeline: Pipeline) -> Wire:
    """Refuse steps that make no sense on the way from the server to the clients, with the reason."""
    wire = Wire(down=True)
    for name, transform in pipeline:
        try:
            if transform.server is not Transform.server:
                raise JobError("it works on the sum of replies, and on the way down nothing is summed; leave it out")
            if transform.remembers:
                raise JobError(
                    "it keeps what it left out for the next time, and a client may miss rounds; leave it out"
                )
            wire = transform.check(wire)
        except JobError as error:
            raise JobError(f"downlink: {name}: {error}") from None
    return wire


def down(pipeline: Pipeline, at: At, parcel: Parcel) -> Parcel:
    """Apply the client halves in order, each with its own memory; the parcel's `kept` holds all of them."""
    at = replace(at, wire=leaves(pipeline, Wire(down=at.client == SERVER)))
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


def arrive(pipeline: Pipeline, at: At, update: State, forms: Sequence[State] = ()) -> State:
    """Decode one client's reply, so that it can be summed; `forms`: what stands before each step, by coding.forms."""
    for place, (_, transform) in reversed(list(enumerate(pipeline))):
        update = transform.arrive(replace(at, form=forms[place]) if forms else at, update)
    return update


def up(pipeline: Pipeline, total: Sum | RingSum, tally: Tally, forms: Sequence[State] = ()) -> State:
    """Apply the server halves in reverse order."""
    result: Total = total
    for place, (_, transform) in reversed(list(enumerate(pipeline))):
        result = transform.server(result, replace(tally, form=forms[place]) if forms else tally)
    if isinstance(result, Sum | RingSum):
        raise TypeError("the pipeline ended with an integer sum: `check` was not called")
    return result
