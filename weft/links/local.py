"""The link within one process: a function call, with the very bytes that a network would carry."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from weft.core.points import point
from weft.core.types import Order, Question, Reply, Site
from weft.links import messages, wire

Watch = Callable[[Literal["up", "down"], str, bytes], None]
"""(way, client, message): called with every message of a round."""


@dataclass(frozen=True)
class Local:
    """Sites in this process."""

    sites: Sequence[Site]
    watch: Watch | None = None

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Send an order to every site; give back the replies with the bytes that each client's messages have."""
        body = wire.pack(order.state)
        point(f"order:{order.kind}")
        received = replace(order, state=wire.unpack(body))
        for site in self.sites:
            for reply in site.handle(received):
                point(f"reply:{reply.client}")
                update = wire.pack(reply.update)
                if not (order.state or reply.update or reply.failure):  # a client for itself, to whom nobody speaks
                    yield reply
                    continue
                down = self._counted("down", reply.client, messages.order_head(order, reply.client), body)
                up = self._counted("up", reply.client, messages.reply_head(reply), update)
                yield replace(reply, update=wire.unpack(update), bytes_up=up, bytes_down=down)

    def _counted(self, way: Literal["up", "down"], client: str, head: dict[str, Any], body: bytes) -> int:
        """Return how long a message is; it is made whole where somebody watches."""
        front = messages.front(head, body)
        if self.watch:
            self.watch(way, client, front + body)
        return len(front) + len(body)

    def ask(self, question: Question) -> list[Any]:
        """Ask every site."""
        return [site.answer(question) for site in self.sites]
