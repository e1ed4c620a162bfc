"""What a server does with the factors of every client, where their mean is not enough."""

from collections.abc import Callable, Sequence
from typing import Any

from weft.core import low_rank
from weft.core.errors import RunError
from weft.core.sums import Sum
from weft.core.types import Algorithm, Reply, State, Tally, Tensors, Work


def any_ranks(
    client: Callable[[Work, State, State], tuple[State, State]],
    combine: Callable[[Sequence[Reply], State, Tally], State],
    **parts: Any,
) -> Algorithm:
    """Return a rule whose clients send `trained`, factors of any ranks, and whose `combine` makes the next state."""

    def server(state: State, update: State, tally: Tally) -> State:
        return update

    def effective(received: State, update: State, initial: Tensors) -> Tensors:
        return update["trained"]

    def cut(update: State) -> State:
        return {"trained": low_rank.trimmed(update["trained"])}

    return Algorithm(client, server, **{"combine": combine, "effective": effective, "cut": cut, **parts})


def trained(replies: Sequence[Reply], state: State, tally: Tally) -> list[Tensors]:
    """Return what each client trained, of any ranks; raise RunError, with its name, for one of other layers."""
    for reply in replies:
        if unlike := _unlike(reply.update.get("trained", {}), state["adapter"]):
            raise RunError(f"round {tally.round}: client {reply.client}: {unlike}")
    return [reply.update["trained"] for reply in replies]


def _unlike(got: Tensors, expected: Tensors) -> str | None:
    for name in sorted(got.keys() ^ expected.keys()):
        return f"{name} is {'not expected' if name in got else 'missing'}"
    for name, tensor in got.items():
        at = low_rank.axis(name)
        sizes, wanted = list(tensor.shape), list(expected[name].shape)
        if at and len(sizes) == len(wanted):
            sizes[at] = wanted[at] = 0
        if sizes != wanted:
            return f"{name} is {tuple(tensor.shape)}, which does not fit {tuple(expected[name].shape)}"
    for b, a in low_rank.pairs(got):
        if low_rank.ranks(got, a) != low_rank.ranks(got, b):
            return f"{b} and {a} have unlike ranks"
    return None


def shares(replies: Sequence[Reply], tally: Tally) -> list[float]:
    """Return each client's part of the mean, p_k."""
    return [tally.weights[reply.client] / tally.total for reply in replies]


def mean(clients: Sequence[Tensors], replies: Sequence[Reply], tally: Tally) -> Tensors:
    """Return the exact weighted mean of tensors that all clients have in the same shapes."""
    total = Sum()
    for client, reply in zip(clients, replies, strict=True):
        total.add({"mean": client}, tally.weights[reply.client])
    return total.divided(tally.total).get("mean", {})


def mean_rest(clients: Sequence[Tensors], replies: Sequence[Reply], tally: Tally) -> Tensors:
    """Return the exact weighted mean of all tensors that are no factors, such as heads."""
    return mean([low_rank.rest(client) for client in clients], replies, tally)
