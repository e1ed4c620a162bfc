"""Clients that agree, mask and open a sum, with a server in between that a test may make drop or lie."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from weft import identity
from weft.core.types import Order, Question, Reply
from weft.secure.coordinator import Agreement, Coordinator
from weft.secure.ledger import Ledger
from weft.secure.member import Member, answer
from weft.secure.setting import fingerprint

NAMES = "abcdefghij"
LENGTH = 5
STATE = {"adapter": {"w": torch.tensor([0.5, -1.0])}}
Tamper = Callable[[str, str, bytes], bytes | None]
"""(kind, client, message to it) -> what it gets instead; None: nothing."""


def untouched(kind: str, client: str, content: bytes) -> bytes | None:
    return content


@dataclass
class Crowd:
    """All clients of a job, and the link to them: `silent` says who no longer answers a kind of question."""

    members: dict[str, Member]
    silent: Mapping[str, Collection[str]] = field(default_factory=dict)
    tamper: Tamper = untouched
    said: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Kind, client and content of every answer that left a client."""

    def exchange(self, order: Order) -> Iterable[Reply]:
        raise NotImplementedError

    def ask(self, question: Question) -> list[Any]:
        kind = question.kind.removeprefix("secure.")
        to = {}
        for name, content in question.body["to"].items():
            changed = None if name in self.silent.get(kind, ()) else self.tamper(kind, name, content)
            if changed is not None:
                to[name] = changed
        found = answer(self.members, replace(question, body={"to": to}))
        self.said += [(kind, name, content) for name, content in found.items()]
        return [found]

    def fork(self, **silent: Collection[str]) -> "Crowd":
        """Return clients in the same state, whose further steps leave these as they are."""
        return Crowd({name: forked(member) for name, member in self.members.items()}, silent)


def forked(member: Member) -> Member:
    session = member._session
    if session is not None:
        parts = {name: dict(getattr(session, name)) for name in ("public", "shares", "answered")}
        session = replace(session, **parts)
    return replace(member, ledger=Ledger(rows=list(member.ledger.rows)), _session=session)


IDENTITIES = {name: identity.new() for name in NAMES}


def crowd(size: int, tamper: Tamper = untouched) -> Crowd:
    """Return the first clients of the alphabet, all drawn in every round."""
    names = tuple(NAMES[:size])
    peers = {name: IDENTITIES[name].public for name in names}
    return Crowd(
        {name: Member(name, IDENTITIES[name], "job", peers, lambda number: names) for name in names}, tamper=tamper
    )


def coordinator(people: Crowd) -> Coordinator:
    return Coordinator("job", {name: member.identity.public for name, member in people.members.items()})


def order(people: Crowd, number: int = 1) -> Order:
    names = tuple(sorted(people.members))
    return Order("train", number, names, STATE, cohort=names)


def begin(people: Crowd, number: int = 1) -> Agreement:
    return coordinator(people).begin(people, order(people, number))


def vector(name: str, number: int = 1) -> Tensor:
    """Return what a client adds: small numbers of both signs."""
    draw = torch.Generator().manual_seed(NAMES.index(name) * 1000 + number)
    return torch.randint(-999, 999, (LENGTH,), generator=draw, dtype=torch.int32)


def hidden(people: Crowd, met: Agreement, name: str, plain: Tensor | None = None) -> Tensor:
    """Return the masked vector of a client, from the order as it got it."""
    number = met.order.round
    plain = vector(name, number) if plain is None else plain
    return people.members[name].hide(number, met.order.secure[name], fingerprint(met.order.state), plain)


def masked_sum(people: Crowd, met: Agreement, names: Iterable[str]) -> Tensor:
    total = torch.zeros(LENGTH, dtype=torch.int32)
    for name in names:
        total += hidden(people, met, name)
    return total


def plain_sum(names: Iterable[str], number: int = 1) -> Tensor:
    total = torch.zeros(LENGTH, dtype=torch.int32)
    for name in names:
        total += vector(name, number)
    return total
