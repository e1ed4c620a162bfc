"""The link within one process: a function call, with the very letters that a network would carry.

Each client is counted as a site of its own: its order, and its reply, are as long as between real sites.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from weft.core.points import point
from weft.core.types import Order, Question, Reply, Site
from weft.links import letters

Watch = Callable[[Literal["up", "down"], str, bytes], None]
"""(way, client, letter): called with every letter of a round."""


@dataclass(frozen=True)
class Local:
    """Sites in this process."""

    sites: Sequence[Site]
    watch: Watch | None = None
    job: str = "0" * 64
    """The job's hash, which every letter names."""

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Send an order to every site; give back the replies with the bytes that each client's letters have."""
        shared = letters.shared_order(self.job, order)
        point(f"order:{order.kind}")
        whole = letters.order_front(shared, order, order.clients) + shared.body
        received = letters.order_of(letters.opened(whole, ("order",), self.job))
        for site in self.sites:
            for reply in site.handle(received):
                point(f"reply:{reply.client}")
                content = letters.replies_letter(self.job, [reply])
                (arrived,) = letters.replies_of(content, order, (reply.client,), self.job)
                if order.state or reply.update or reply.failure:  # else a client for itself, to whom nobody speaks
                    front = letters.order_front(shared, order, (reply.client,))
                    self._show(reply.client, front, shared.body, content)
                    arrived = replace(arrived, bytes_up=len(content), bytes_down=len(front) + len(shared.body))
                yield arrived

    def _show(self, client: str, front: bytes, body: bytes, content: bytes) -> None:
        """Let whoever watches see the order and the reply of a client."""
        if self.watch:
            self.watch("down", client, front + body)
            self.watch("up", client, content)

    def ask(self, question: Question) -> list[Any]:
        """Ask every site."""
        return [site.answer(question) for site in self.sites]
