"""The link within one process: a function call, with the very bytes that a network would carry."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.core.points import point
from weft.core.types import Order, Question, Reply, Site
from weft.links import wire


@dataclass(frozen=True)
class Local:
    """Sites in this process."""

    sites: Sequence[Site]

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Send an order to every site; give back the replies with the bytes that each client caused."""
        sent = wire.pack(order.state)
        point(f"order:{order.kind}")
        received = replace(order, state=wire.unpack(sent))
        for site in self.sites:
            for reply in site.handle(received):
                point(f"reply:{reply.client}")
                update = wire.pack(reply.update)
                yield replace(
                    reply,
                    update=wire.unpack(update),
                    bytes_up=len(update) if reply.update else 0,
                    bytes_down=len(sent) if order.state else 0,
                )

    def ask(self, question: Question) -> list[Any]:
        """Ask every site."""
        return [site.answer(question) for site in self.sites]
