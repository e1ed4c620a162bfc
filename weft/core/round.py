"""One round: sample clients, send orders, sum the replies exactly, walk the pipeline up, step, record."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from weft.core import keys, pipeline, trees
from weft.core.errors import RunError
from weft.core.failures import Policy
from weft.core.measure import MeanUpdate, Spread
from weft.core.pipeline import Pipeline
from weft.core.points import point
from weft.core.sums import Sum
from weft.core.template import template
from weft.core.types import Algorithm, At, Link, Order, Products, Reply, Server, State, Tally, Tensors

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


@dataclass
class Gathered:
    """What a round has collected so far."""

    expected: State | None
    """The names, shapes and types of an update; None where they differ from client to client."""
    total: Sum = field(default_factory=Sum)
    replies: dict[str, Reply] = field(default_factory=dict)
    effective: MeanUpdate = field(default_factory=MeanUpdate)
    spread: Spread = field(default_factory=Spread)
    ignored: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    """Client -> why it is not counted."""
    again: dict[str, str] = field(default_factory=dict)
    """Client -> why it was asked once more; it is counted, or among the lost."""
    hopeless: set[str] = field(default_factory=set)
    """Clients that would fail in the same way again."""


def sample(federation: Federation, number: int) -> tuple[str, ...]:
    """Draw a round's cohort uniformly without replacement, in name order."""
    order = keys.permutation(len(federation.clients), federation.seed, number, "cohort")
    return tuple(sorted(federation.clients[i] for i in order[: federation.per_round]))


def refusal(reply: Reply, expected: State | None) -> tuple[str, bool] | None:
    """Say why a reply cannot be counted, and whether a number that is not finite is the reason."""
    if reply.failure:
        return reply.failure, reply.not_finite
    if bad := trees.not_finite(reply.update):
        return f"{bad} holds a NaN or an infinity; lower the learning rate or look at this client's data", True
    different = None if expected is None else trees.difference(reply.update, expected)
    return (different, False) if different else None


def gather(federation: Federation, order: Order, link: Link) -> Gathered:
    """Collect one reply of each client of the order, in whatever order they come; ask again by the policy."""
    policy = federation.policy
    got = Gathered(_expected(federation, order))
    _collect(got, federation, order, link)
    for _ in range(policy.retries if policy.on_client_failure == "retry" else 0):
        if not (lost := tuple(name for name in order.clients if name in got.lost and name not in got.hopeless)):
            break
        got.again |= {name: got.lost[name] for name in lost}
        _collect(got, federation, replace(order, clients=lost), link)
    policy.check(order.round, len(order.clients), got.lost)
    return got


def _expected(federation: Federation, order: Order) -> State | None:
    algorithm = federation.algorithm
    return None if algorithm.combine else template(algorithm, order.state, federation.initial, order.round)


def _collect(got: Gathered, federation: Federation, order: Order, link: Link) -> None:
    """Count the replies to one sending of an order."""
    for reply in link.exchange(order):
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
    algorithm, at = federation.algorithm, At(federation.seed, order.round, reply.client, order.state, order.cohort)
    update = pipeline.arrive(federation.pipeline, at, reply.update)
    reply = replace(reply, update=update)
    if wrong := refusal(reply, got.expected):
        return wrong
    if not algorithm.combine:
        got.total.add(update, reply.weight)
    if federation.products and update and not algorithm.personal:
        ended = _ended(algorithm, order.state, update, federation.initial)
        got.effective.add(federation.products(ended), reply.weight)
    if "adapter" in update and "adapter" in order.state:
        got.spread.add(reply.client, trees.subtract(update["adapter"], order.state["adapter"]))
    got.replies[reply.client] = reply if algorithm.combine else replace(reply, update={})
    return None


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
    order = Order("train", number, cohort, sent, since, cohort=cohort)
    got = gather(federation, order, link)
    tally = tally_of(federation, order, got)
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


def tally_of(federation: Federation, order: Order, got: Gathered) -> Tally:
    """Return who is counted in a round, with what weight."""
    names = sorted(got.replies)
    return Tally(
        order.round,
        {name: got.replies[name].weight for name in names},
        {name: got.replies[name].examples for name in names},
        len(federation.clients),
        order.state,
    )


def _update(federation: Federation, state: State, got: Gathered, tally: Tally) -> State:
    """Return what the server steps with: the mean of the updates, or the algorithm's own combination."""
    if federation.algorithm.combine:
        return federation.algorithm.combine([got.replies[name] for name in sorted(got.replies)], state, tally)
    return pipeline.up(federation.pipeline, got.total, tally) if got.total.limbs else {}


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
        "bytes_up": sum(got.replies[name].bytes_up for name in names),
        "bytes_down": sum(got.replies[name].bytes_down for name in names),
        "clients": {name: _client(got.replies[name], got.spread) for name in names},
    }


def _client(reply: Reply, spread: Spread) -> Record:
    norm = spread.norms.get(reply.client)
    return {
        "weight": reply.weight,
        "examples": reply.examples,
        "bytes_up": reply.bytes_up,
        "bytes_down": reply.bytes_down,
        "update_norm": None if norm is None else float(f"{norm:.6g}"),
        **reply.metrics,
    }
