"""What every transform must pass, in a pipeline of its own."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from weft.core import coding, pipeline, trees
from weft.core.errors import RunError, WeftError
from weft.core.pipeline import Pipeline
from weft.core.ring import RingSum, code
from weft.core.sums import Sum
from weft.core.types import At, Parcel, State, Tally, Transform, Wire
from weft.links.wire import pack, unpack
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


def _at(name: str) -> At:
    """Return the address of a client that started from the same adapter as all others."""
    start = {"adapter": {"w": toys.draw((3, 4), "start"), "v": toys.draw((5,), "start")}}
    return At(7, 1, name, start, ("a", "b", "c"), secret=b"conformance", hide=partial(_masked, name))


def _masked(name: str, vector: Tensor) -> Tensor:
    """Add masks that cancel in the sum of the three clients."""
    masks = {"a": 2**30, "b": 2**30, "c": -(2**31)}
    return vector + masks[name]


def _empty(steps: Pipeline, wire: Wire) -> Sum | RingSum:
    if not wire.ring:
        return Sum()
    return RingSum(code(wire, 3), coding.forms(steps, _at("a"), _parcels()["a"].update)[-1])


def _rounds(renew: Callable[[], Pipeline], order: str) -> list[tuple[Sum | RingSum, Tally]]:
    """Return the sums of two rounds of the same updates, each client with its memory through bytes."""
    found = []
    memories: dict[str, bytes] = {}
    for number in (1, 2):
        steps = renew()
        wire = pipeline.check(steps)
        total, sent = _empty(steps, wire), {name: _sent(steps, number, name, memories.get(name)) for name in order}
        for name, parcel in sent.items():
            memories[name] = pack(parcel.kept)
            total.add(_arrived(steps, wire, number, name, unpack(pack(parcel.update))), parcel.weight)
        weights = {name: sent[name].weight for name in sorted(sent)}
        examples = {name: _parcels()[name].examples for name in weights}
        found.append((total, Tally(number, weights, examples, 3, _at("a").received, 7, b"checks", wire)))
    return found


def _sent(steps: Pipeline, number: int, name: str, memory: bytes | None) -> Parcel:
    parcel = replace(_parcels()[name], kept=unpack(memory) if memory else {})
    return coding.encode(steps, replace(_at(name), round=number), parcel, _parcels()[name].update)


def _arrived(steps: Pipeline, wire: Wire, number: int, name: str, update: State) -> State:
    if wire.ring:
        return update
    at, form = replace(_at(name), round=number), _parcels()[name].update
    return coding.decode(steps, at, update, form) if wire.encoded else pipeline.arrive(steps, at, update)


def _walked(steps: Pipeline, order: str, renew: Callable[[], Pipeline] | None = None) -> list[State]:
    """Return what two rounds end with; `renew` makes the steps anew for each, as after a stop."""
    with running("the transform fails on three clients"):
        forms = coding.forms(steps, _at("a"), _parcels()["a"].update)
        rounds = _rounds(renew or (lambda: steps), order)
        return [pipeline.up(steps, total, tally, forms) for total, tally in rounds]


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
    """Send float32 updates, or codes, with a positive integer as weight, and end with float32."""
    steps = steps_around(make, before)
    coded = pipeline.check(steps).encoded
    with running("the client half fails"):
        parcels = [pipeline.down(steps, _at(name), parcel) for name, parcel in _parcels().items()]
    for parcel in parcels:
        if not coded:
            require_float32("an update", parcel.update)
        whole = type(parcel.weight) is int and parcel.weight > 0
        require(whole, f"a weight is a positive integer, not {parcel.weight!r}")
    for result in _walked(steps, "abc"):
        require_float32("the result", result)


def check_transform_order(make: Make, before: Steps = ()) -> None:
    """Give the same bits in whatever order clients reply."""
    results = [bits(_walked(steps_around(make, before), order)) for order in ("abc", "cab", "bca")]
    require(results[0] == results[1] == results[2], "the result depends on the order in which clients reply")


def check_one_client(make: Make, before: Steps = ()) -> None:
    """Give one client's update back bit for bit. For transforms that take a mean."""
    steps = steps_around(make, before)
    result = bits(_walked(steps, "a")[0])
    require(result == bits(_parcels()["a"].update), "the mean of one client's update is not that update")


def check_form(make: Make, before: Steps = ()) -> None:
    """Let the form of what is sent follow from the form of what is given, and give that form back on arrival."""
    steps = steps_around(make, before)
    parcels = _parcels()
    with running("the client half fails"):
        wire, forms = pipeline.check(steps), coding.forms(steps, _at("a"), parcels["a"].update)
        form = RingSum(code(wire, 3), forms[-1]).expected if wire.ring else forms[-1]
        sent = {name: pipeline.down(steps, _at(name), parcel).update for name, parcel in parcels.items()}
    if not any(step.varies for _, step in steps):
        for update in sent.values():
            wrong = trees.difference(update, form)
            require(not wrong, f"what is sent has no form that is known before: {wrong}; say `varies` where it must")
    if wire.encoded and not wire.ring:  # what a ring holds comes back from the sum alone
        for name, update in sent.items():
            with running("a reply cannot be decoded"):
                back = pipeline.arrive(steps, _at(name), update, forms)
            wrong = trees.difference(back, parcels[name].update)
            require(not wrong, f"`arrive` does not give back what was encoded: {wrong}")


def check_damage(make: Make, before: Steps = ()) -> None:
    """Decode anything of the right form, or refuse it with one sentence; let nothing else come out."""
    steps = steps_around(make, before)
    update, form = pipeline.down(steps, _at("a"), _parcels()["a"]).update, _parcels()["a"].update
    wire = pipeline.check(steps)
    if wire.ring or not wire.encoded:  # in a ring every vector of the right form is as good as another
        return
    for part, tree in update.items():
        for name, tensor in tree.items():
            for damaged in _damages(tensor):
                broken = update | {part: tree | {name: damaged}}
                with running(f"a damaged {part}/{name} is not refused with a sentence"):
                    _decoded_or_refused(steps, broken, form)


def _damages(tensor: Tensor) -> list[Tensor]:
    """Return tensors of another length, type, shape or with other bits."""
    flat = tensor.reshape(-1)
    noise = [replaced.view(tensor.dtype).view(tensor.shape) for replaced in _other_bits(flat)]
    return [flat[:-1], torch.cat([flat, flat]), tensor.double(), tensor.unsqueeze(0), *noise]


def _other_bits(flat: Tensor) -> list[Tensor]:
    size = flat.numel() * flat.itemsize
    drawn = [(toys.draw((size,), "damage", i) * 50).to(torch.int64).to(torch.uint8) for i in range(8)]
    return [*drawn, torch.zeros(size, dtype=torch.uint8), torch.full((size,), 255, dtype=torch.uint8)]


def _decoded_or_refused(steps: Pipeline, update: State, form: State) -> None:
    try:
        back = coding.decode(steps, _at("a"), update, form)
    except RunError as error:
        require("\n" not in str(error), "the refusal is more than one sentence")
        return
    wrong = trees.difference(back, form)
    require(not wrong, f"a damaged message is decoded to something else: {wrong}")


def check_memory(make: Make, before: Steps = ()) -> None:
    """Say `remembers` where something is kept, keep it in the parcel alone, and find it again after a stop."""
    steps = steps_around(make, before)
    kept = pipeline.down(steps, _at("a"), _parcels()["a"]).kept
    require(not kept or any(step.remembers for _, step in steps), "something is kept, and `remembers` is false")
    once, again = _walked(steps, "abc"), _walked(steps, "abc")
    require(bits(once) == bits(again), "a repeated round ends elsewhere; what is kept belongs into the parcel's `kept`")
    anew = _walked(steps, "abc", lambda: steps_around(make, before))
    require(bits(once) == bits(anew), "a run that is stopped ends elsewhere; what is kept belongs into `kept`")


TRANSFORM = (
    check_wire,
    check_transform_inputs,
    check_draws,
    check_parcel,
    check_transform_order,
    check_form,
    check_damage,
    check_memory,
    check_one_client,
)


def check_transform(make: Make, before: Steps = (), waive: Collection[str] = ()) -> None:
    """Run all checks of a transform that stands after `before`; only a mean must give one client back."""
    mean = not before and make().check(Wire()).weighted
    run_all(TRANSFORM, {*waive, *(() if mean else ("check_one_client",))}, make, before)
