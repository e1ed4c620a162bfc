"""One round: sample clients, send orders, sum the replies exactly, walk the pipeline up, step, record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from weft.core import coding, pipeline, trees
from weft.core.errors import RunError
from weft.core.failures import Policy
from weft.core.length import untold
from weft.core.measure import MeanUpdate, Spread, projected, seen
from weft.core.meeting import Meeting, Secure
from weft.core.pace import Pace
from weft.core.pipeline import Pipeline
from weft.core.points import point
from weft.core.ring import RingSum, code
from weft.core.sampling import UNIFORM, Member, Pool, Sampler
from weft.core.sums import Sum
from weft.core.template import template
from weft.core.types import (
    Algorithm,
    At,
    Link,
    Order,
    Parcel,
    Products,
    Reply,
    Server,
    State,
    Tally,
    Tensors,
    Wire,
    whole,
)

SAMPLER = "sampler"  # the part of what a server keeps beside its state
Record = dict[str, Any]
"""What the journal keeps of a round, ready for JSON."""


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round."""

    algorithm: Algorithm
    pipeline: Pipeline
    clients: tuple[str, ...]
    per_round: int
    seed: int
    products: Callable[[Tensors], Products] | None = None
    """The effective updates of an adapter, where the method has them (LoRA: scale B, A)."""
    initial: Tensors = field(default_factory=dict)
    """The first adapter."""
    policy: Policy = field(default_factory=Policy)
    sampler: Sampler = UNIFORM
    members: Mapping[str, Member] = field(default_factory=dict)
    """What is known of the clients; of one that is missing nothing is."""
    pace: Pace | None = None
    """An asynchronous server; None: each round waits for its cohort."""
    secure: Secure | None = None
    """The server's half of secure aggregation, where the pipeline hides updates."""
    downlink: Pipeline = ()
    """The steps from the server to the clients."""
    secret: bytes = field(default=b"", repr=False)
    """What privacy noise is drawn from."""

    @cached_property
    def wire(self) -> Wire:
        """Return what is known of an update that leaves a client."""
        return pipeline.check(self.pipeline)


@dataclass
class Gathered:
    """What a round has collected so far."""

    sent: State
    """What the link carries to the clients."""
    form: State
    """The names, shapes and types of an update."""
    loose: bool = False
    """Shapes may differ between clients, which send no more than their own ranks."""
    forms: list[State] = field(default_factory=list)
    """The same before each step of the pipeline and after the last, where updates are encoded."""
    began: Tensors = field(default_factory=dict)
    """What is measured of the adapter that clients began with."""
    total: Sum | RingSum = field(default_factory=Sum)
    replies: dict[str, Reply] = field(default_factory=dict)
    effective: MeanUpdate = field(default_factory=MeanUpdate)
    spread: Spread = field(default_factory=Spread)
    ignored: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    """Client -> why it is not counted."""
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Client -> bytes up and down of all its messages, counted or not."""
    again: dict[str, str] = field(default_factory=dict)
    """Client -> why it was asked once more; it is counted, or among the lost."""
    hopeless: set[str] = field(default_factory=set)
    """Clients that would fail in the same way again."""


def pool(federation: Federation, number: int, memory: Tensors) -> Pool:
    """Return whom a round's cohort is drawn from."""
    size = 8 * trees.count(federation.initial)  # four bytes a number, down and up
    return Pool(federation.clients, federation.per_round, federation.seed, number, federation.members, memory, size)


def not_a_number(name: str) -> str:
    """Say that a tensor cannot be counted."""
    return f"{name} holds a NaN or an infinity; lower the learning rate or look at this client's data"


def sample(federation: Federation, number: int, memory: Tensors | None = None) -> tuple[str, ...]:
    """Draw a round's cohort, in name order; memory: what the sampler kept."""
    return tuple(sorted(federation.sampler.draw(pool(federation, number, memory or {}))))


def refusal(reply: Reply, expected: State, loose: bool) -> tuple[str, bool] | None:
    """Say why a reply cannot be counted, and whether a number that is not finite is the reason.

    loose: shapes may differ from those that are expected.
    """
    if reply.failure:
        return reply.failure, reply.not_finite
    if bad := trees.not_finite(reply.update):
        return not_a_number(bad), True
    different = trees.difference(reply.update, trees.shaped_as(expected, reply.update) if loose else expected)
    return (different, False) if different else None


def gather(
    federation: Federation, order: Order, link: Link, sent: State | None = None, lost: Mapping[str, str] | None = None
) -> Gathered:
    """Collect the replies to an order; raise RunError where too few can be counted.

    sent: what the link carries, where it is not the order's state itself. lost: clients of the cohort that the order
    is not for, and why.
    """
    got = begin(federation, order, sent)
    for name, reason in sorted(dict(lost or {}).items()):
        _lose(got, federation.policy, name, order.round, reason, not_finite=False)
    ask(got, federation, order, link)
    federation.policy.check(order.round, len(order.cohort or order.clients), got.lost)
    return got


def ask(got: Gathered, federation: Federation, order: Order, link: Link) -> None:
    """Collect one reply of each client of the order, in whatever order they come; ask again by the policy."""
    policy = federation.policy
    _collect(got, federation, order, link)
    for _ in range(policy.retries if policy.on_client_failure == "retry" else 0):
        if not (again := tuple(name for name in order.clients if name in got.lost and name not in got.hopeless)):
            break
        got.again |= {name: got.lost[name] for name in again}
        _collect(got, federation, replace(order, clients=again), link)


def begin(federation: Federation, order: Order, sent: State | None = None) -> Gathered:
    """Return what is known of an order's replies before any arrives."""
    algorithm = federation.algorithm
    form = template(algorithm, order.state, federation.initial, order.round, order.clients)
    forms = coding.forms(federation.pipeline, _at(federation, order, ""), form) if federation.wire.encoded else []
    got = Gathered(order.state if sent is None else sent, form, algorithm.cut is not whole, forms)
    if federation.wire.ring:  # the last form is what stands before it
        got.total = RingSum(code(federation.wire, len(order.cohort)), forms[-1])
    elif not algorithm.personal:
        got.began = _seen(federation, _ended(algorithm, order.state, form, federation.initial))
    return got


def _seen(federation: Federation, adapter: Tensors) -> Tensors:
    return seen(adapter, projected(federation.products(adapter)) if federation.products else {})


def _collect(got: Gathered, federation: Federation, order: Order, link: Link) -> None:
    """Count the replies to one sending of an order."""
    for reply in link.exchange(replace(order, state=got.sent)):
        up, down = got.traffic.get(reply.client, (0, 0))
        got.traffic[reply.client] = up + reply.bytes_up, down + reply.bytes_down
        if reply.round != order.round or reply.client not in order.clients or reply.client in got.replies:
            got.ignored.append(reply.client)
            continue
        try:
            wrong = _accept(got, federation, order, reply)
        except RunError as error:
            wrong = str(error), False
        if wrong:
            _lose(got, federation.policy, reply.client, order.round, *wrong)
        else:
            got.lost.pop(reply.client, None)
            point(f"counted:{reply.client}")
    missing = [name for name in order.clients if name not in got.replies and name not in got.lost]
    if missing and federation.policy.aborts(not_finite=False):
        raise RunError(f"round {order.round}: no reply from {', '.join(sorted(missing))}")
    got.lost |= dict.fromkeys(missing, "no reply")


def _lose(got: Gathered, policy: Policy, client: str, number: int, reason: str, not_finite: bool) -> None:
    if policy.aborts(not_finite):
        raise RunError(f"round {number}: client {client}: {reason}")
    got.lost[client] = reason
    if not_finite:
        got.hopeless.add(client)


def _accept(got: Gathered, federation: Federation, order: Order, reply: Reply) -> tuple[str, bool] | None:
    """Add a reply to the sum and to what is measured, or say why not.

    It is kept whole only where the algorithm must see it.
    """
    if reply.failure:
        return reply.failure, reply.not_finite
    if isinstance(got.total, RingSum):
        return _accept_integers(got, got.total, reply)
    if (most := federation.wire.heaviest) and not 0 < reply.weight <= most:
        return f"a weight of {reply.weight} is not one of 1 to {most}, as weigh has it", False
    algorithm, at = federation.algorithm, _at(federation, order, reply.client)
    reply = replace(reply, update=_decoded(federation, at, reply.update, got))
    if wrong := refusal(reply, got.form, got.loose) or untold(federation.wire, reply):
        return wrong
    if not algorithm.combine:
        got.total.add(reply.update, reply.weight)
    if federation.wire.delta:
        reply = replace(reply, update=trees.moved(reply.update, at.received, 1.0))
    try:
        _measure(got, federation, order, reply)
    except RuntimeError as error:  # torch's, for shapes that belong to no adapter of this base
        return f"its tensors do not fit the adapter ({str(error).splitlines()[0]})", False
    got.replies[reply.client] = reply if algorithm.combine else replace(reply, update={})
    return None


def _measure(got: Gathered, federation: Federation, order: Order, reply: Reply) -> None:
    """Count what a client's update did; of a personal method, what of it is the server's."""
    algorithm, update = federation.algorithm, reply.update
    if not algorithm.personal and update:
        ended = _ended(algorithm, order.state, update, federation.initial)
        modules = projected(federation.products(ended)) if federation.products else {}
        change = trees.subtract(seen(ended, modules), got.began)
        got.effective.count(modules, reply.weight)
        got.spread.add(reply.client, change)
    elif shared := [part for part in update if part in order.state and trees.norm(update[part])]:
        changes = {part: trees.subtract(update[part], order.state[part]) for part in shared}
        got.spread.add(reply.client, trees.flatten(changes))


def _accept_integers(got: Gathered, total: RingSum, reply: Reply) -> tuple[str, bool] | None:
    """Add a vector of a ring: nothing is measured of one client's update, masked or not."""
    if wrong := refusal(reply, total.expected, loose=False):
        return wrong
    total.add(reply.update, reply.weight)
    got.replies[reply.client] = replace(reply, update={})
    return None


def _decoded(federation: Federation, at: At, update: State, got: Gathered) -> State:
    if not federation.wire.encoded:
        return pipeline.arrive(federation.pipeline, at, update)
    if got.loose:
        return coding.decode(federation.pipeline, at, update, got.form, free=True)
    return coding.decode_as(federation.pipeline, at, update, got.forms)


def _at(federation: Federation, order: Order, client: str) -> At:
    return At(federation.seed, order.round, client, _origin(federation, order), order.cohort)


def _origin(federation: Federation, order: Order) -> State:
    return federation.algorithm.origin(order.state, federation.initial)


def _ended(algorithm: Algorithm, received: State, update: State, initial: Tensors) -> Tensors:
    """Return the adapter that a client ended its round with."""
    if algorithm.effective:
        return algorithm.effective(received, update, initial)
    return algorithm.serve({**received, **update}, {}, initial)


def run_round(server: Server, federation: Federation, link: Link) -> tuple[Server, Record]:
    """Run the round after `server.round`; return the next server and what the journal keeps of it."""
    number, algorithm = server.round + 1, federation.algorithm
    sent = {part: server.state[part] for part in algorithm.sends}
    drawn_from = pool(federation, number, server.beside.get(SAMPLER, {}))
    cohort = tuple(sorted(federation.sampler.draw(drawn_from)))
    if not cohort:
        return replace(server, round=number), nobody(number)
    since = {name: server.since.get(name, 0) for name in cohort}
    carried, received = _carried(federation, number, sent)
    order = Order("train", number, cohort, received, since, cohort=cohort, length=federation.wire.length)
    meeting = federation.secure.begin(link, order) if federation.secure else None
    order = meeting.order if meeting else order
    got = gather(federation, order, link, carried, meeting.lost if meeting else {})
    summed = _summed(got, link, meeting)
    tally = tally_of(federation, replace(order, state=sent), got)
    point(f"summed:{number}")
    state = algorithm.server(server.state, combined(federation, server.state, got, tally), tally)
    point(f"stepped:{number}")
    if bad := trees.not_finite(state):
        raise RunError(f"round {number}: the server step left a NaN or an infinity in {bad}")
    counted = {**server.since, **dict.fromkeys(sorted(got.replies), number)}
    error = None
    if got.effective.sums and federation.products:
        error = got.effective.error(federation.products(algorithm.serve(state, {}, federation.initial)))
    learned = federation.sampler.learn(drawn_from, {name: got.replies[name].metrics for name in sorted(got.replies)})
    beside = {**server.beside, **({SAMPLER: learned} if learned else {})}
    return Server(state, number, counted, beside), record(order, got, error) | summed


def _summed(got: Gathered, link: Link, meeting: Meeting | None) -> Record:
    """Take the masks off a ring sum; return what the journal keeps of a sum that no client's numbers stand beside."""
    total = got.total
    if not isinstance(total, RingSum):
        return {}
    kept: Record = {}
    if meeting:
        kept["secure"] = meeting.finish(link, sorted(got.replies), total.vector)
        for name, (up, down) in meeting.traffic.items():
            before = got.traffic.get(name, (0, 0))
            got.traffic[name] = before[0] + up, before[1] + down
        kept["clients"] = {name: _traffic(got, name) for name in sorted(got.replies)}
    total.check()
    loss = None if total.loss is None else float(f"{total.loss:.6g}")
    return {**kept, "weight": total.weight, "train_loss": loss}


def _traffic(got: Gathered, name: str) -> Record:
    up, down = got.traffic[name]
    return {"bytes_up": up, "bytes_down": down}


def _carried(federation: Federation, number: int, sent: State) -> tuple[State, State]:
    """Return what stands on the wire on the way down, and what clients make of it."""
    if not federation.downlink:
        return sent, sent
    form = coding.form_down(federation.algorithm, federation.initial)
    at = coding.at_down(federation.seed, number)
    coded = coding.encode(federation.downlink, at, Parcel(sent, 1), form).update
    return coded, coding.decode(federation.downlink, at, coded, form, free=True)


def tally_of(federation: Federation, order: Order, got: Gathered) -> Tally:
    """Return who is counted in a round, with what weight."""
    names = sorted(got.replies)
    return Tally(
        order.round,
        {name: got.replies[name].weight for name in names},
        {name: got.replies[name].examples for name in names},
        len(federation.clients),
        _origin(federation, order),
        federation.seed,
        federation.secret,
        federation.wire,
    )


def combined(federation: Federation, state: State, got: Gathered, tally: Tally) -> State:
    """Return what the server steps with: the mean of the updates, or the algorithm's own combination."""
    if federation.algorithm.combine:
        return federation.algorithm.combine([got.replies[name] for name in sorted(got.replies)], state, tally)
    if isinstance(got.total, Sum) and not got.total.limbs:
        return {}
    return pipeline.up(federation.pipeline, got.total, tally, got.forms)


def nobody(number: int) -> Record:
    """Describe a round that asked nobody and changed nothing."""
    order = Order("train", number, (), {})
    return {**record(order, Gathered({}, {}), None), "empty": "no client was drawn, so nothing changed"}


def record(order: Order, got: Gathered, error: float | None) -> Record:
    """Describe a finished round; measured numbers to six digits, which is what they are good for."""
    names = sorted(got.replies)
    measured = {"aggregation_error": error, "drift": got.spread.drift(), "cosine": got.spread.cosine()}
    return {
        "round": order.round,
        "cohort": sorted(order.cohort or order.clients),
        "ignored": sorted(got.ignored),
        "dropped": dict(sorted(got.lost.items())),
        "asked_again": dict(sorted(got.again.items())),
        **{name: None if value is None else float(f"{value:.6g}") for name, value in measured.items()},
        "bytes_up": sum(up for up, _ in got.traffic.values()),
        "bytes_down": sum(down for _, down in got.traffic.values()),
        "bytes_lost": {name: list(got.traffic[name]) for name in sorted(got.traffic.keys() - got.replies.keys())},
        "clients": {name: _client(got.replies[name], got.spread, *got.traffic[name]) for name in names},
    }


def _client(reply: Reply, spread: Spread, up: int, down: int) -> Record:
    norm = spread.norms.get(reply.client)
    return {
        "weight": reply.weight,
        "examples": reply.examples,
        "bytes_up": up,
        "bytes_down": down,
        "update_norm": None if norm is None else float(f"{norm:.6g}"),
        **reply.metrics,
    }
