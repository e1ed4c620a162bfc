"""A simulated network between a server and its sites: replies are lost, late, doubled, re-ordered and corrupted.

Every fault is drawn from one seed, so that a failure can be played again. What is late arrives in a later exchange,
where it is a stranger: of another round, or of a client that has been counted by then. A message travels with a
digest, as TLS has for each of its records, so that a flipped bit becomes a failure and never a number.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from weft.core.errors import RunError
from weft.core.types import Link, Order, Question, Reply
from weft.links import wire


@dataclass
class Network:
    """A link over which the replies of another one travel badly; each fault has its own probability."""

    link: Link
    seed: int
    lost: float = 0.15
    late: float = 0.15
    doubled: float = 0.15
    corrupted: float = 0.15
    faults: Counter[str] = field(default_factory=Counter)
    """What has happened so far."""
    waiting: list[Reply] = field(default_factory=list)
    """Replies on their way that no exchange has delivered."""
    digest: bool = True
    """False: a negative control, whose flipped bits nobody sees."""

    def __post_init__(self) -> None:
        self.draw = Random(self.seed)

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Give back what arrives of this order, and what was late of those before, in a drawn order."""
        arriving, self.waiting = self.waiting, []
        for reply in self.link.exchange(order):
            arriving += self._sent(reply)
        self.draw.shuffle(arriving)
        yield from arriving

    def _sent(self, reply: Reply) -> list[Reply]:
        """Return the copies of a reply that arrive in this exchange."""
        for fault in ("lost", "late", "doubled", "corrupted"):
            if self.draw.random() >= getattr(self, fault):
                continue
            self.faults[fault] += 1
            if fault == "lost":
                return []
            if fault == "late":
                self.waiting.append(reply)
                return []
            return [reply, reply] if fault == "doubled" else [self._corrupted(reply)]
        return [reply]

    def _corrupted(self, reply: Reply) -> Reply:
        """Flip one bit, or cut the message short."""
        content = wire.pack(reply.update)
        seal = hashlib.sha256(content).digest()
        place = self.draw.randrange(8 * len(content))
        if self.draw.random() < 0.25:
            content = content[: place // 8]
        else:
            byte = content[place // 8] ^ (1 << place % 8)
            content = content[: place // 8] + bytes([byte]) + content[place // 8 + 1 :]
        if self.digest and hashlib.sha256(content).digest() != seal:
            return Reply(reply.client, reply.round, failure="the message is damaged")
        try:
            return replace(reply, update=wire.unpack(content))
        except RunError as error:
            return Reply(reply.client, reply.round, failure=str(error))

    def ask(self, question: Question) -> Sequence[Any]:
        """Ask every site; questions arrive."""
        return self.link.ask(question)
