"""The second kind of round, without waiting: clients work at their own speed, the server steps when a buffer is full.

The same orders and replies as in round.py, in an order that a virtual clock gives: each client's time comes from its
device, drawn by an address. A client is trained when its reply is due, from the state that it began with, which is kept
as long as anybody works on it. All that is under way - who, since which state, until when - is part of the server, so a
run that is stopped and resumed takes up the same replies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from weft.core import keys, trees
from weft.core.errors import RunError
from weft.core.length import adapted
from weft.core.pace import Pace
from weft.core.points import point
from weft.core.round import Federation, Gathered, Record, ask, begin, combined, record, run_round, tally_of
from weft.core.sampling import Device, Member
from weft.core.types import Link, Order, Server, State, Tensors

FLIGHTS, STATE = "flights", "state-"  # parts of what a server keeps beside its state


@dataclass(frozen=True)
class Flight:
    """One client at work."""

    client: str
    version: int
    """The round whose state it began with."""
    due: float
    """Virtual seconds."""
    number: int
    """How many began before it: of two that are due together the first counts as earlier."""


@dataclass(frozen=True)
class Clock:
    """Who is at work, and what time it is."""

    now: float = 0.0
    begun: int = 0
    flights: tuple[Flight, ...] = ()


@dataclass(frozen=True)
class Group:
    """What came of the clients of a buffer that began with one state."""

    version: int
    base: State
    update: State
    weight: int


def advance(server: Server, federation: Federation, link: Link) -> tuple[Server, Record]:
    """Run the next round, of the kind that the federation has."""
    if federation.pace:
        return run_buffered(server, federation, federation.pace, link)
    return adapted(run_round, server, federation, link)


def run_buffered(server: Server, federation: Federation, pace: Pace, link: Link) -> tuple[Server, Record]:
    """Wait for a buffer of replies and step; return the next server and what the journal keeps of it."""
    number, algorithm = server.round + 1, federation.algorithm
    clock, arrived = until_full(_clock(server, federation), federation, pace, server.round)
    order, got, groups = _collected(server, federation, link, arrived)
    federation.policy.check(number, len(arrived), got.lost)
    tally = tally_of(federation, order, got)
    point(f"summed:{number}")
    update = mixed(_sent(server.state, federation), groups, server.round, pace)
    state = algorithm.server(server.state, update, tally)
    point(f"stepped:{number}")
    if bad := trees.not_finite(state):
        raise RunError(f"round {number}: the server step left a NaN or an infinity in {bad}")
    since = {**server.since, **dict.fromkeys(sorted(got.replies), number)}
    after = Server(state, number, since, _beside(server, federation, clock))
    return after, _record(order, got, clock, {one.client: server.round - one.version for one in arrived}, pace)


def until_full(clock: Clock, federation: Federation, pace: Pace, version: int) -> tuple[Clock, list[Flight]]:
    """Let time pass until a buffer of clients has replied; who replies is replaced by another at once."""
    arrived: list[Flight] = []
    while len(arrived) < pace.buffer:
        clock = _filled(clock, federation, version, {one.client for one in arrived})
        first = min(clock.flights, key=lambda one: (one.due, one.number))
        left = tuple(one for one in clock.flights if one is not first)
        arrived.append(first)
        clock = replace(clock, now=first.due, flights=left)
    return clock, arrived


def _filled(clock: Clock, federation: Federation, version: int, waiting: set[str]) -> Clock:
    """Start clients until as many are at work as the job says, or nobody is free."""
    flights, begun = list(clock.flights), clock.begun
    busy = waiting | {one.client for one in flights}
    free = [name for name in federation.clients if name not in busy]
    while free and len(flights) < federation.per_round:
        name = free.pop(keys.number(federation.seed, "start", begun) % len(free))
        flights.append(Flight(name, version, clock.now + _seconds(federation, name, begun), begun))
        begun += 1
    return replace(clock, flights=tuple(flights), begun=begun)


def _seconds(federation: Federation, name: str, number: int) -> float:
    member = federation.members.get(name, Member(device=Device(0.0)))
    usual = member.device.seconds(member.steps, 8 * trees.count(federation.initial))  # four bytes a number, both ways
    return member.device.drawn(usual, federation.seed, "flight", number)


def _collected(
    server: Server, federation: Federation, link: Link, arrived: Sequence[Flight]
) -> tuple[Order, Gathered, list[Group]]:
    """Ask those who are due, one order for each state that they began with; return all replies together as well."""
    number, algorithm, groups = server.round + 1, federation.algorithm, []
    cohort = tuple(sorted(one.client for one in arrived))
    whole = Gathered({}, {})
    for version in sorted({one.version for one in arrived}):
        base = _state_of(server, federation, version)
        names = tuple(sorted(one.client for one in arrived if one.version == version))
        order = Order("train", number, names, base, {name: server.since.get(name, 0) for name in names}, cohort=cohort)
        got = replace(begin(federation, order), spread=whole.spread)
        ask(got, federation, order, link)
        whole.replies |= got.replies
        whole.lost |= got.lost
        whole.again |= got.again
        whole.ignored += got.ignored
        whole.traffic |= got.traffic
        if got.replies:
            update = combined(federation, base, got, tally_of(federation, order, got))
            if strange := sorted(update.keys() - set(algorithm.sends)):
                raise RunError(f"the algorithm sends {strange[0]}, which says nothing once the state has moved on")
            groups.append(Group(version, base, update, got.total.weight))
    return Order("train", number, cohort, _sent(server.state, federation), cohort=cohort), whole, groups


def mixed(now: State, groups: Sequence[Group], version: int, pace: Pace) -> State:
    """Return where the server's state of now goes by all updates: now + sum_g p_g s_g (mean_g - base_g).

    A buffer of fresh updates that count in full gives their mean, bit for bit.
    """
    factors = [pace.factor(version - group.version) for group in groups]
    if len(groups) == 1 and groups[0].version == version and factors[0] == 1:
        return groups[0].update
    total = sum(group.weight for group in groups)
    result = {part: {name: value.double() for name, value in tree.items()} for part, tree in now.items()}
    for group, factor in zip(groups, factors, strict=True):
        base, share = group.base if pace.from_start else now, factor * group.weight / total
        for part, tree in group.update.items():
            for name, value in tree.items():
                result[part][name] += share * (value.double() - base[part][name].double())
    return {part: {name: value.float() for name, value in tree.items()} for part, tree in result.items()}


# --- what is kept from round to round


def _sent(state: State, federation: Federation) -> State:
    return {part: state[part] for part in federation.algorithm.sends}


def _state_of(server: Server, federation: Federation, version: int) -> State:
    """Return what the clients were sent that began after a round."""
    if version == server.round:
        return _sent(server.state, federation)
    mark = f"{STATE}{version}-"
    return {part.removeprefix(mark): tree for part, tree in server.beside.items() if part.startswith(mark)}


def _clock(server: Server, federation: Federation) -> Clock:
    """Return the clock as it was when the last round ended."""
    held = server.beside.get(FLIGHTS)
    if held is None:
        return Clock()
    rows = zip(*(held[name].tolist() for name in ("client", "version", "due", "number")), strict=True)
    flights = tuple(Flight(federation.clients[i], version, due, number) for i, version, due, number in rows)
    return Clock(float(held["now"]), int(held["begun"]), flights)


def _beside(server: Server, federation: Federation, clock: Clock) -> State:
    """Return the clock, and the states that clients at work began with."""
    places = {name: i for i, name in enumerate(federation.clients)}
    held: Tensors = {
        "client": torch.tensor([places[one.client] for one in clock.flights], dtype=torch.int64),
        "version": torch.tensor([one.version for one in clock.flights], dtype=torch.int64),
        "due": torch.tensor([one.due for one in clock.flights], dtype=torch.float64),
        "number": torch.tensor([one.number for one in clock.flights], dtype=torch.int64),
        "now": torch.tensor([clock.now], dtype=torch.float64),
        "begun": torch.tensor([clock.begun], dtype=torch.int64),
    }
    states: State = {}
    for version in sorted({one.version for one in clock.flights}):
        for part, tree in _state_of(server, federation, version).items():  # a step may leave a tensor as it was
            states[f"{STATE}{version}-{part}"] = {name: value.clone() for name, value in tree.items()}
    return {FLIGHTS: held, **states}


def _record(order: Order, got: Gathered, clock: Clock, stale: Mapping[str, int], pace: Pace) -> Record:
    """Describe a round: as any other, with the virtual time and how old each update was."""
    row = record(order, got, None)
    for name, client in row["clients"].items():
        client |= {"staleness": stale[name], "factor": float(f"{pace.factor(stale[name]):.6g}")}
    ages = [stale[name] for name in row["clients"]]
    return {
        **row,
        "virtual_seconds": float(f"{clock.now:.6g}"),
        "staleness": float(f"{sum(ages) / len(ages):.6g}"),
        "at_work": len(clock.flights),
    }
