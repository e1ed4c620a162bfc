"""A site that is several workers: blocks of clients from one queue, each worker with a resident base of its own.

A block is composed as one process composes it, whatever the number of workers, and sums are free of order: so results
do not depend on how many there are, nor on who takes which block.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from weft.core.errors import RunError
from weft.core.types import Order, Question, Reply
from weft.links import letters
from weft.links.crew import Crew
from weft.links.letters import Tree

SAME = {"fingerprint": "base", "tokenizer": "tokenizer"}
"""What workers must agree on: field of their description -> its name."""


@dataclass(frozen=True)
class Part:
    """A part of an order that one worker handles whole."""

    clients: tuple[str, ...]
    groups: tuple[str, ...] = ()
    """Test groups that are measured; none: all."""


@dataclass
class Pool:
    """The site of one method: a letter for each block, or for each part of an evaluation."""

    crew: Crew
    job: str
    at: Tree
    """Method, folder and block: which site a worker handles an order at."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Test group -> its examples, where it may be measured apart from others."""
    notice: Callable[[str], None] = lambda text: None
    on_client: Callable[[str], None] = lambda client: None

    def handle(self, order: Order) -> Iterator[Reply]:
        """Yield a reply for each client, in the order in which the workers are done."""
        parts = self._parts(order)
        names = {str(place): part.clients for place, part in enumerate(parts)}
        more = {str(place): {"groups": list(part.groups)} for place, part in enumerate(parts)}
        fronts, body = letters.order_letters(self.job, order, names, more, at=self.at)
        sealed = [partial(b"".join, (fronts[name], body)) for name in names]
        for place, trees in self.crew.all(sealed):
            for tree in trees:
                reply = letters.reply_of(tree, order, parts[place].clients)
                if not parts[place].groups:
                    self.on_client(reply.client)
                yield reply

    def answer(self, question: Question) -> Any:
        """Ask every worker, compare what must be alike, and return the answer of the first."""
        body = {"kind": question.kind, "body": dict(question.body)}
        answers = self.crew.each(letters.letter("question", self.job, at=self.at, **body))
        for answer in answers:
            for name, what in SAME.items():
                if answer.get(name) != answers[0].get(name):
                    raise RunError(f"two workers have another {what}; give all the same files")
        return answers[0]

    def _parts(self, order: Order) -> list[Part]:
        """Divide an order, the largest parts first."""
        if order.kind == "train":
            return self._blocks(order)
        most = 4 * len(self.crew.alive)
        if len(order.clients) > 1:
            return [Part(order.clients[place::most]) for place in range(min(most, len(order.clients)))]
        largest = sorted(self.groups, key=lambda name: (-self.groups[name], name))
        return [Part(order.clients, tuple(largest[place::most])) for place in range(min(most, len(largest)))] or [
            Part(order.clients)
        ]

    def _blocks(self, order: Order) -> list[Part]:
        """Let a worker compose the blocks, as a site alone would."""
        since = {name: order.since[name] for name in order.clients if name in order.since}
        body = {"round": order.round, "clients": list(order.clients), "since": since}
        ((_, blocks),) = self.crew.all([lambda: letters.letter("blocks", self.job, at=self.at, **body)])
        workers = len(self.crew.alive)
        if len(blocks) < min(workers, len(order.clients)):
            self.notice(f"{len(blocks)} blocks of clients for {workers} workers: some wait; a smaller --block helps")
        return [Part(tuple(names)) for names in reversed(blocks)]
