"""The link between real sites: Flower carries the letters, this decides who gets which and how long to wait.

A site that is away keeps its place until the deadline; when it comes back it gets the order again. Without a
deadline it counts as lost once nothing has been heard of it for `absent` seconds. Whatever imports flwr is here.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weft.core.errors import RunError
from weft.core.types import Order, Question, Reply
from weft.links import letters
from weft.links.flower.hub import Hub
from weft.links.flower.records import array

REMIND = 30.0  # seconds between two words about who is awaited


@dataclass
class Flower:
    """Sites that connect to a hub."""

    hub: Hub
    job: str
    """The job's hash."""
    clients: Mapping[str, tuple[str, ...]]
    """Site -> the clients that it speaks for."""
    say: Callable[[str], None]
    deadline: float | None = None
    """Seconds for an order or a question; later is lost."""
    absent: float = 600.0
    """Seconds of silence after which a site is lost where there is no deadline."""
    busy: Callable[[str, str], None] = field(default=lambda site, what: None)
    """(site, what it does now), for a display."""

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Send an order to the sites of its clients; yield one reply each, a failure for who is lost."""
        asked = self._asked(order)
        fronts, body = letters.order_letters(self.job, order, asked)
        whole, sizes = array(body), {site: len(front) + len(body) for site, front in fronts.items()}
        tickets = {self.hub.send(site, front, whole): site for site, front in fronts.items()}
        for site in asked:
            self.busy(site, f"{order.kind} {order.round}")
        for site, content, sent in self.arriving(tickets):
            self.busy(site, "")
            if isinstance(content, RunError):
                replies = [Reply(name, order.round, failure=str(content)) for name in asked[site]]
            else:
                replies = self._replies(content, order, asked[site], sizes[site] * sent)
            del content  # whoever counts the replies has them alone
            while replies:
                yield replies.pop(0)

    def _asked(self, order: Order) -> dict[str, tuple[str, ...]]:
        """Return the clients of an order by site; what is no client of one site, such as `*`, goes to all."""
        known = {name for names in self.clients.values() for name in names}
        other = tuple(name for name in order.clients if name not in known)
        asked = {
            site: tuple(name for name in order.clients if name in names) + other for site, names in self.clients.items()
        }
        return {site: names for site, names in asked.items() if names}

    def _replies(self, content: bytes, order: Order, clients: tuple[str, ...], down: int) -> list[Reply]:
        """Open a site's letter; its bytes are counted at the first of its clients, so that they add up exactly."""
        found = letters.replies_of(content, order, clients, self.job)
        if found:
            found[0] = replace(found[0], bytes_up=len(content), bytes_down=down)
        return found

    def ask(self, question: Question) -> list[Any]:
        """Ask every site; return the answers of those that answered, in the order of the sites.

        A body with `to`, {client: anything}, is cut to the site's own clients and so is its answer, {client: anything};
        a site with none of them is not asked.
        """
        bodies = {site: _cut(question.body, own) for site, own in self.clients.items()}
        tickets = {
            self.send(site, "question", kind=question.kind, body=body): site
            for site, body in bodies.items()
            if body.get("to") != {}
        }
        answers: dict[str, Any] = {}
        for site, content, _ in self.arriving(tickets):
            try:
                answers[site] = self._answer(content, bodies[site].get("to"))
            except RunError as error:
                self.say(f"{site} did not answer `{question.kind}`: {error}")
        return [answers[site] for site in self.clients if site in answers]

    def _answer(self, content: bytes | RunError, to: Mapping[str, Any] | None) -> Any:
        """Return what a site answered, of the clients alone that it was asked for; raise RunError where it did not."""
        if isinstance(content, RunError):
            raise content
        tree = letters.opened(content, ("answer", "failure"), self.job)
        if tree["is"] == "failure":
            raise RunError(str(tree.get("reason"))[:1000])
        if to is None:
            return tree.get("body")
        return {name: value for name, value in letters.field_of(tree, "body", dict).items() if name in to}

    def send(self, site: str, what: str, /, **tree: Any) -> int:
        """Leave one letter for a site; return its ticket."""
        return self.hub.send(site, letters.letter(what, self.job, **tree), array(b""))

    def arriving(self, tickets: Mapping[int, str]) -> Iterator[tuple[str, bytes | RunError, int]]:
        """Yield (site, letter or why there is none, times it was sent) as they come, each site once."""
        began, said, left = time.monotonic(), time.monotonic(), dict(tickets)
        try:
            while left:
                while found := self.hub.collect(left):
                    site = left.pop(found[0])
                    yield site, *found[1:]
                    del found
                for number, reason in self._lost(left, time.monotonic() - began).items():
                    yield left.pop(number), RunError(reason), 0
                if left and time.monotonic() - said > REMIND:
                    said = time.monotonic()
                    self.say(f"waiting for {', '.join(map(self._told, sorted(left.values())))}")
                if left:
                    with self.hub.changed:
                        self.hub.changed.wait(0.5)
        finally:
            self.hub.forget(tickets)

    def _lost(self, left: Mapping[int, str], waited: float) -> dict[int, str]:
        if self.deadline is not None:
            if waited < self.deadline:
                return {}
            return {
                number: f"gave no reply within {self.deadline:.0f} s, the job's failures.deadline ({self._told(site)})"
                for number, site in left.items()
            }
        return {
            number: f"has been away for {self._silence(site, waited):.0f} s"
            for number, site in left.items()
            if self._silence(site, waited) > self.absent
        }

    def _silence(self, site: str, waited: float) -> float:
        silent = self.hub.silent(site)
        return waited if silent is None else silent

    def _told(self, site: str) -> str:
        silent = self.hub.silent(site)
        if silent is None:
            return f"{site} (never here)"
        return f"{site} ({'at work' if self.hub.online(site) else f'away for {silent:.0f} s'})"


def _cut(body: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Return the body of a question for the clients of one site."""
    if not isinstance(body.get("to"), Mapping):
        return dict(body)
    return {**body, "to": {name: value for name, value in body["to"].items() if name in own}}


def missing(sites: Collection[str], hub: Hub) -> list[str]:
    """Return the sites that are not connected now."""
    return [site for site in sites if hub.silent(site) is None or not hub.online(site)]
