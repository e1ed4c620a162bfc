"""What every link must pass: all replies, bit for bit, with the bytes that they took."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from weft.core.sums import Sum
from weft.core.types import Link, Order, Question, Site
from weft.links import letters
from weft.testing import toys
from weft.testing.algorithms import MEAN
from weft.testing.sound import bits, require, run_all, running
from weft.testing.toys import Toy, ToySite

MakeLink = Callable[[Sequence[Site]], Link]


def _sites(*groups: str) -> list[Site]:
    from weft.algorithms.fedavg import fedavg

    everyone = toys.toy(per_round=5)
    parts = [Toy({name: everyone.clients[name] for name in group}, 5) for group in groups]
    return [ToySite(part, fedavg(), MEAN) for part in parts]


def _order(kind: Any = "train") -> Order:
    return Order(kind, 1, ("a", "b", "c", "d", "e"), {"adapter": toys.adapter()}, dict.fromkeys("abcde", 0))


def _replies(make: MakeLink, order: Order, *groups: str) -> dict[str, Any]:
    with running("the link fails"):
        replies = list(make(_sites(*groups)).exchange(order))
    found = {reply.client: reply for reply in replies}
    require(len(found) == len(replies) == 5, f"5 clients gave {len(replies)} replies")
    return found


def check_replies(make: MakeLink) -> None:
    """Carry the order and the replies bit for bit: training and evaluation, from one site or from three."""
    for kind in ("train", "evaluate"):
        expected = {reply.client: reply for reply in _sites("abcde")[0].handle(_order(kind))}
        for groups in (("abcde",), ("ab", "c", "de")):
            for name, reply in _replies(make, _order(kind), *groups).items():
                plain = replace(reply, bytes_up=0, bytes_down=0)
                require(bits(plain) == bits(expected[name]), f"client {name} sent another reply")


def check_bytes(make: MakeLink) -> None:
    """Count as bytes of a client that is alone at its site what its whole letters take."""
    order, job = _order(), "0" * 64
    fronts, body = letters.order_letters(job, order, {name: (name,) for name in order.clients})
    for name, reply in _replies(make, order, *order.clients).items():
        up, down = len(letters.replies_letter(job, [reply])), len(fronts[name]) + len(body)
        require(reply.bytes_up == up, f"client {name} sent {up} bytes, {reply.bytes_up} are counted")
        require(reply.bytes_down == down, f"client {name} got {down} bytes, {reply.bytes_down} are counted")


def check_link_order(make: MakeLink) -> None:
    """Give the same sum whichever site answers first, and leave the order as it was."""
    order, sums = _order(), []
    before = bits(order)
    for groups in (("ab", "c", "de"), ("de", "ab", "c")):
        total = Sum()
        for reply in _replies(make, order, *groups).values():
            total.add(reply.update, reply.weight)
        sums.append(bits(total.divided(total.weight)))
    require(sums[0] == sums[1], "the sum of the replies depends on the order of the sites")
    require(bits(order) == before, "the link changes the order that it sends")


def check_questions(make: MakeLink) -> None:
    """Ask every site once and give back the answers in the order of the sites."""
    with running("the link fails"):
        answers = list(make(_sites("ab", "c", "de")).ask(Question("toy", {"word": 1})))
    expected = [{"kind": "toy", "body": {"word": 1}, "clients": tuple(group)} for group in ("ab", "c", "de")]
    require(answers == expected, "the answers are not those of each site, in the order of the sites")


LINK = (check_replies, check_bytes, check_link_order, check_questions)


def check_link(make: MakeLink, waive: Collection[str] = ()) -> None:
    """Run all checks of a link; `make` gets the sites that it must reach."""
    run_all(LINK, waive, make)
