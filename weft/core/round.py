"""One round: sample clients, send orders, sum the replies exactly, walk the pipeline up, step, record."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from weft.core import coding, keys, pipeline, trees
from weft.core.errors import RunError
from weft.core.failures import Policy
from weft.core.measure import MeanUpdate, Spread
from weft.core.pipeline import Pipeline
from weft.core.points import point
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
    fixed: bool = True
    """All clients' updates have this form; false where they send no more than their own ranks."""
    forms: list[State] = field(default_factory=list)
    """The same before each step of the pipeline and after the last, where updates are encoded."""
    total: Sum = field(default_factory=Sum)
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


def sample(federation: Federation, number: int) -> tuple[str, ...]:
    """Draw a round's cohort uniformly without replacement, in name order."""
    order = keys.permutation(len(federation.clients), federation.seed, number, "cohort")
    return tuple(sorted(federation.clients[i] for i in order[: federation.per_round]))


def not_a_number(name: str) -> str:
    """Say that a tensor cannot be counted."""
    return f"{name} holds a NaN or an infinity; lower the learning rate or look at this client's data"


def refusal(reply: Reply, expected: State | None) -> tuple[str, bool] | None:
    """Say why a reply cannot be counted, and whether a number that is not finite is the reason."""
    if reply.failure:
        return reply.failure, reply.not_finite
    if bad := trees.not_finite(reply.update):
        return not_a_number(bad), True
    different = None if expected is None else trees.difference(reply.update, expected)
    return (different, False) if different else None


def gather(federation: Federation, order: Order, link: Link, sent: State | None = None) -> Gathered:
    """Collect one reply of each client of the order, in whatever order they come; ask again by the policy.

    sent: what the link carries, where it is not the order's state itself.
    """
    policy, algorithm = federation.policy, federation.algorithm
    form = template(algorithm, order.state, federation.initial, order.round)
    forms = coding.forms(federation.pipeline, _at(federation, order, ""), form) if federation.wire.encoded else []
    got = Gathered(order.state if sent is None else sent, form, algorithm.cut is whole, forms)
    _collect(got, federation, order, link)
    for _ in range(policy.retries if policy.on_client_failure == "retry" else 0):
        if not (lost := tuple(name for name in order.clients if name in got.lost and name not in got.hopeless)):
            break
        got.again |= {name: got.lost[name] for name in lost}
        _collect(got, federation, replace(order, clients=lost), link)
    policy.check(order.round, len(order.clients), got.lost)
    return got


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
    algorithm, at = federation.algorithm, _at(federation, order, reply.client)
    if (most := federation.wire.heaviest) and not 0 < reply.weight <= most:
        return f"a weight of {reply.weight} is not one of 1 to {most}, as weigh has it", False
    reply = replace(reply, update=_decoded(federation, at, reply.update, got))
    if wrong := refusal(reply, got.form if got.fixed else None):
        return wrong
    if not algorithm.combine:
        got.total.add(reply.update, reply.weight)
    update = trees.moved(reply.update, at.received, 1.0) if federation.wire.delta else reply.update
    if federation.products and update and not algorithm.personal:
        ended = _ended(algorithm, order.state, update, federation.initial)
        got.effective.add(federation.products(ended), reply.weight)
    if "adapter" in update and "adapter" in order.state:
        got.spread.add(reply.client, trees.subtract(update["adapter"], order.state["adapter"]))
    got.replies[reply.client] = replace(reply, update=update if algorithm.combine else {})
    return None


def _decoded(federation: Federation, at: At, update: State, got: Gathered) -> State:
    if not federation.wire.encoded:
        return pipeline.arrive(federation.pipeline, at, update)
    if got.fixed:
        return coding.decode_as(federation.pipeline, at, update, got.forms)
    return coding.decode(federation.pipeline, at, update, got.form, free=True)


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
    cohort = sample(federation, number)
    since = {name: server.since.get(name, 0) for name in cohort}
    carried, received = _carried(federation, number, sent)
    order = Order("train", number, cohort, received, since, cohort=cohort)
    got = gather(federation, order, link, carried)
    tally = tally_of(federation, replace(order, state=sent), got)
    point(f"summed:{number}")
    state = algorithm.server(server.state, _update(federation, server.state, got, tally), tally)
    point(f"stepped:{number}")
    if bad := trees.not_finite(state):
        raise RunError(f"round {number}: the server step left a NaN or an infinity in {bad}")
    counted = {**server.since, **dict.fromkeys(sorted(got.replies), number)}
    error = None
    if got.effective.weight and federation.products:
        error = got.effective.error(federation.products(algorithm.serve(state, {}, federation.initial)))
    return Server(state, number, counted), record(order, got, error)


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


def _update(federation: Federation, state: State, got: Gathered, tally: Tally) -> State:
    """Return what the server steps with: the mean of the updates, or the algorithm's own combination."""
    if federation.algorithm.combine:
        return federation.algorithm.combine([got.replies[name] for name in sorted(got.replies)], state, tally)
    if not got.total.limbs:
        return {}
    return pipeline.up(federation.pipeline, got.total, tally, got.forms)


def record(order: Order, got: Gathered, error: float | None) -> Record:
    """Describe a finished round; measured numbers to six digits, which is what they are good for."""
    names = sorted(got.replies)
    measured = {"aggregation_error": error, "drift": got.spread.drift(), "cosine": got.spread.cosine()}
    return {
        "round": order.round,
        "cohort": sorted(order.clients),
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
