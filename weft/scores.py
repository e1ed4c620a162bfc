"""Measure adapters through a link: sums come back, groups and their pooled whole are summarized here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.core.metrics import added
from weft.core.round import Federation
from weft.core.types import Link, Metrics, Order, Server

EVERYONE = "*"  # the client of an evaluation of the global adapter

Score = dict[str, Any]
"""{"overall": metrics, "groups": {group: metrics}}, ready for JSON."""


@dataclass(frozen=True)
class Scorer:
    """Measures one method: its federation over its link."""

    link: Link
    federation: Federation
    summarize: Callable[[Metrics], Metrics]

    def untrained(self, metrics: tuple[str, ...]) -> Score:
        """Measure the base as it is."""
        (reply,) = self._measured(Order("untrained", 0, (EVERYONE,), {}, {}, metrics)).values()
        return reply

    def shared(self, server: Server, metrics: tuple[str, ...]) -> Score:
        """Measure the global adapter on every test group and on all together."""
        (reply,) = self._ask(server, (EVERYONE,), metrics).values()
        return reply

    def final(self, server: Server, metrics: tuple[str, ...]) -> Score:
        """Measure the global adapter, or the mean over the clients' own where each has one."""
        if not self.federation.algorithm.personal:
            return self.shared(server, metrics)
        return _average(self._ask(server, self.federation.clients, metrics))

    def _ask(self, server: Server, clients: tuple[str, ...], metrics: tuple[str, ...]) -> dict[str, Score]:
        algorithm = self.federation.algorithm
        sent = {part: server.state[part] for part in algorithm.serves or algorithm.sends}
        since = {name: server.since.get(name, 0) for name in clients}
        return self._measured(Order("evaluate", server.round, clients, sent, since, metrics))

    def _measured(self, order: Order) -> dict[str, Score]:
        measured: dict[str, list[Mapping[str, Metrics]]] = {}
        for reply in self.link.exchange(order):
            measured.setdefault(reply.client, []).append(reply.measured)
        return {name: self._summary(measured[name]) for name in sorted(measured)}

    def _summary(self, measured: Sequence[Mapping[str, Metrics]]) -> Score:
        """Add up what several sites measured of one adapter."""
        groups: dict[str, Metrics] = {}
        for answer in measured:
            for name, sums in answer.items():
                groups[name] = added([groups.get(name, {}), sums])
        overall = added(groups[name] for name in sorted(groups))
        return {
            "overall": self.summarize(overall),
            "groups": {name: self.summarize(groups[name]) for name in sorted(groups)},
        }


def _mean(rows: Sequence[Metrics]) -> Metrics:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _average(clients: Mapping[str, Score]) -> Score:
    """Average over clients' own adapters; `own` is each client's score on its own group, where there is one."""
    rows = [clients[name] for name in sorted(clients)]
    groups = {group: _mean([row["groups"][group] for row in rows]) for group in rows[0]["groups"]}
    return {
        "overall": _mean([row["overall"] for row in rows]),
        "groups": groups,
        "own": {name: row["groups"][name] for name, row in sorted(clients.items()) if name in row["groups"]},
        "clients": {name: clients[name]["overall"] for name in sorted(clients)},
    }
