"""One round: sample clients, send orders, sum the replies exactly, walk the pipeline up, step, record."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from weft.core import keys, pipeline, trees
from weft.core.errors import RunError
from weft.core.measure import MeanUpdate
from weft.core.pipeline import Pipeline
from weft.core.sums import Sum
from weft.core.types import Algorithm, Link, Order, Products, Reply, Server, Tally, Tensors

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


@dataclass
class Gathered:
    """What a round has collected so far."""

    total: Sum = field(default_factory=Sum)
    replies: dict[str, Reply] = field(default_factory=dict)
    effective: MeanUpdate = field(default_factory=MeanUpdate)
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
    return trees.difference(reply.update, expected) if expected else None


def gather(federation: Federation, order: Order, link: Link) -> Gathered:
    """Collect one reply of each client of the order, in whatever order they come."""
    got = Gathered()
    for reply in link.exchange(order):
        if reply.round != order.round or reply.client not in order.clients or reply.client in got.replies:
            got.ignored.append(reply.client)
            continue
        if reason := refusal(reply, order):
            raise RunError(f"round {order.round}: client {reply.client}: {reason}")
        try:
            got.total.add(reply.update, reply.weight)
        except RunError as error:
            raise RunError(f"round {order.round}: client {reply.client}: {error}") from None
        if federation.products and "adapter" in reply.update:
            got.effective.add(federation.products(reply.update["adapter"]), reply.weight)
        got.replies[reply.client] = replace(reply, update={})
    if missing := sorted(set(order.clients) - set(got.replies)):
        raise RunError(f"round {order.round}: no reply from {', '.join(missing)}")
    return got


def run_round(server: Server, federation: Federation, link: Link) -> tuple[Server, Record]:
    """Run the round after `server.round`; return the next server and what the journal keeps of it."""
    number = server.round + 1
    sent = {part: server.state[part] for part in federation.algorithm.sends}
    cohort = sample(federation, number)
    order = Order("train", number, cohort, sent, {name: server.since.get(name, 0) for name in cohort})
    got = gather(federation, order, link)
    tally = Tally(
        number,
        {name: got.replies[name].weight for name in cohort},
        {name: got.replies[name].examples for name in cohort},
    )
    update = pipeline.up(federation.pipeline, got.total, tally) if got.total.limbs else {}
    state = federation.algorithm.server(server.state, update, tally)
    if bad := trees.not_finite(state):
        raise RunError(f"round {number}: the server step left a NaN or an infinity in {bad}")
    since = {**server.since, **dict.fromkeys(cohort, number)}
    error = None
    if got.effective.weight and federation.products:
        error = float(f"{got.effective.error(federation.products(state['adapter'])):.6g}")
    return Server(state, number, since), record(order, got, error)


def record(order: Order, got: Gathered, error: float | None) -> Record:
    """Describe a finished round."""
    names = sorted(got.replies)
    return {
        "round": order.round,
        "cohort": names,
        "ignored": sorted(got.ignored),
        "aggregation_error": error,
        "bytes_up": sum(got.replies[name].bytes_up for name in names),
        "bytes_down": sum(got.replies[name].bytes_down for name in names),
        "clients": {name: _client(got.replies[name]) for name in names},
    }


def _client(reply: Reply) -> Record:
    return {
        "weight": reply.weight,
        "examples": reply.examples,
        "bytes_up": reply.bytes_up,
        "bytes_down": reply.bytes_down,
        **reply.metrics,
    }
