"""One round: sample clients, send orders, sum the replies exactly, walk the pipeline up, step, record."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from weft.core import keys, pipeline, trees
from weft.core.errors import RunError
from weft.core.measure import MeanUpdate, Spread
from weft.core.pipeline import Pipeline
from weft.core.sums import Sum
from weft.core.types import Algorithm, Link, Order, Products, Reply, Server, State, Tally, Tensors

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


@dataclass
class Gathered:
    """What a round has collected so far."""

    total: Sum = field(default_factory=Sum)
    replies: dict[str, Reply] = field(default_factory=dict)
    effective: MeanUpdate = field(default_factory=MeanUpdate)
    spread: Spread = field(default_factory=Spread)
    ignored: list[str] = field(default_factory=list)


def sample(federation: Federation, number: int) -> tuple[str, ...]:
    """Draw a round's cohort uniformly without replacement, in name order."""
    order = keys.permutation(len(federation.clients), federation.seed, number, "cohort")
    return tuple(sorted(federation.clients[i] for i in order[: federation.per_round]))


def refusal(reply: Reply, order: Order) -> str | None:
    """Say why a reply cannot be counted."""
    if reply.failure:
        return reply.failure
    if bad := trees.not_finite(reply.update):
        return f"{bad} holds a NaN or an infinity; lower the learning rate or look at this client's data"
    expected = {part: order.state[part] for part in reply.update if part in order.state}
    return trees.difference({part: reply.update[part] for part in expected}, expected)


def gather(federation: Federation, order: Order, link: Link) -> Gathered:
    """Collect one reply of each client of the order, in whatever order they come."""
    got = Gathered()
    for reply in link.exchange(order):
        if reply.round != order.round or reply.client not in order.clients or reply.client in got.replies:
            got.ignored.append(reply.client)
            continue
        try:
            if reason := refusal(reply, order):
                raise RunError(reason)
            _count(got, federation, order, reply)
        except RunError as error:
            raise RunError(f"round {order.round}: client {reply.client}: {error}") from None
    if missing := sorted(set(order.clients) - set(got.replies)):
        raise RunError(f"round {order.round}: no reply from {', '.join(missing)}")
    return got


def _count(got: Gathered, federation: Federation, order: Order, reply: Reply) -> None:
    """Add a reply to the sum and to what is measured; keep it whole only where the algorithm must see it."""
    algorithm = federation.algorithm
    if not algorithm.combine:
        got.total.add(reply.update, reply.weight)
    if federation.products and reply.update and not algorithm.personal:
        ended = _ended(algorithm, order.state, reply.update, federation.initial)
        got.effective.add(federation.products(ended), reply.weight)
    if "adapter" in reply.update and "adapter" in order.state:
        got.spread.add(reply.client, trees.subtract(reply.update["adapter"], order.state["adapter"]))
    got.replies[reply.client] = reply if algorithm.combine else replace(reply, update={})


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
    order = Order("train", number, cohort, sent, {name: server.since.get(name, 0) for name in cohort})
    got = gather(federation, order, link)
    tally = Tally(
        number,
        {name: got.replies[name].weight for name in cohort},
        {name: got.replies[name].examples for name in cohort},
        len(federation.clients),
    )
    state = algorithm.server(server.state, _update(federation, server.state, got, tally), tally)
    if bad := trees.not_finite(state):
        raise RunError(f"round {number}: the server step left a NaN or an infinity in {bad}")
    since = {**server.since, **dict.fromkeys(cohort, number)}
    error = None
    if got.effective.weight and federation.products:
        error = got.effective.error(federation.products(algorithm.serve(state, {}, federation.initial)))
    return Server(state, number, since), record(order, got, error)


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
        "cohort": names,
        "ignored": sorted(got.ignored),
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
