"""What every transform must pass, in a pipeline of its own."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from weft.core import pipeline
from weft.core.errors import WeftError
from weft.core.pipeline import Pipeline
from weft.core.sums import Sum
from weft.core.types import At, Parcel, State, Tally, Transform, Wire
from weft.testing import toys
from weft.testing.algorithms import MEAN
from weft.testing.sound import bits, guarded, require, require_float32, run_all, running

Make = Callable[[], Transform]
Steps = Sequence[Make]


def steps_around(make: Make, before: Steps = ()) -> Pipeline:
    """Return a pipeline that ends with the transform, or with `weigh` where nothing has weighted yet."""
    steps = [(f"step {place}", step()) for place, step in enumerate((*before, make))]
    with running("the transform refuses its place in the pipeline"):
        weighted = reduce(lambda known, step: step[1].check(known), steps, Wire()).weighted
    return steps if weighted else [*steps, *MEAN]


def _parcels() -> dict[str, Parcel]:
    return {
        name: Parcel({"adapter": {"w": toys.draw((3, 4), name), "v": toys.draw((5,), name)}}, size)
        for name, size in (("a", 3), ("b", 1), ("c", 4))
    }


def _total(steps: Pipeline, order: str) -> tuple[Sum, Tally]:
    total, parcels = Sum(), {name: pipeline.down(steps, At(7, 1, name), _parcels()[name]) for name in order}
    for name in order:
        total.add(parcels[name].update, parcels[name].weight)
    weights = {name: parcels[name].weight for name in sorted(parcels)}
    return total, Tally(1, weights, {name: _parcels()[name].examples for name in sorted(parcels)})


def _walked(steps: Pipeline, order: str) -> State:
    with running("the transform fails on three clients"):
        return pipeline.up(steps, *_total(steps, order))


def check_wire(make: Make, before: Steps = ()) -> None:
    """Let `check` be a pure function of what is known."""
    transform, known = make(), reduce(lambda wire, step: step().check(wire), before, Wire())
    results = []
    for _ in range(3):
        try:
            results.append(transform.check(known))
        except WeftError as error:
            raise AssertionError(f"`check` refuses its place in the pipeline: {error}") from error
    require(isinstance(results[0], Wire), "`check` must return a Wire")
    require(results[0] == results[1] == results[2], "`check` gives another answer when it is asked again")


def check_transform_inputs(make: Make, before: Steps = ()) -> None:
    """Leave the parcel, the sum and the tally as they were, in all halves."""

    def watched() -> Transform:
        transform = make()
        halves: dict[str, Any] = {
            name: guarded(name, getattr(transform, name)) for name in ("client", "arrive", "server")
        }
        return replace(transform, **halves)

    _walked(steps_around(watched, before), "abc")


def check_draws(make: Make, before: Steps = ()) -> None:
    """Draw from addresses only: the global generator changes nothing and is not touched."""
    results, steps = [], steps_around(make, before)
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = bits(torch.get_rng_state())
            results.append(bits(_walked(steps, "abc")))
            require(bits(torch.get_rng_state()) == state, "the transform draws from torch's global generator")
    require(results[0] == results[1], "the transform gives another result when it is asked again")


def check_parcel(make: Make, before: Steps = ()) -> None:
    """Send float32 updates with a positive integer as weight, and end with float32."""
    steps = steps_around(make, before)
    with running("the client half fails"):
        parcels = [pipeline.down(steps, At(7, 1, name), parcel) for name, parcel in _parcels().items()]
    for parcel in parcels:
        require_float32("an update", parcel.update)
        whole = type(parcel.weight) is int and parcel.weight > 0
        require(whole, f"a weight is a positive integer, not {parcel.weight!r}")
    require_float32("the result", _walked(steps, "abc"))


def check_transform_order(make: Make, before: Steps = ()) -> None:
    """Give the same bits in whatever order clients reply."""
    results = [bits(_walked(steps_around(make, before), order)) for order in ("abc", "cab", "bca")]
    require(results[0] == results[1] == results[2], "the result depends on the order in which clients reply")


def check_one_client(make: Make, before: Steps = ()) -> None:
    """Give one client's update back bit for bit. For transforms that take a mean."""
    steps = steps_around(make, before)
    result = bits(_walked(steps, "a"))
    require(result == bits(_parcels()["a"].update), "the mean of one client's update is not that update")


TRANSFORM = (
    check_wire,
    check_transform_inputs,
    check_draws,
    check_parcel,
    check_transform_order,
    check_one_client,
)


def check_transform(make: Make, before: Steps = (), waive: Collection[str] = ()) -> None:
    """Run all checks of a transform that stands after `before`; only a mean must give one client back."""
    mean = not before and make().check(Wire()).weighted
    run_all(TRANSFORM, {*waive, *(() if mean else ("check_one_client",))}, make, before)
