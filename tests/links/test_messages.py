"""Whole messages: there and back, as long as is counted, refused where they are damaged."""

import pytest
import torch

from weft.core.errors import RunError
from weft.core.types import Order, Reply
from weft.links import messages, wire
from weft.testing.sound import bits

ORDER = Order("train", 3, ("a", "b"), {"adapter": {"w": torch.ones(2)}}, {"a": 2, "b": 0}, ("loss",), ("a", "b", "c"))
REPLY = Reply(
    "a", 3, {"quantize": {"codes": torch.ones(3).to(torch.int8)}}, 5, 5, {"loss": 0.1}, {"g": {"loss": float("inf")}}
)


def sealed(head: dict[str, object], body: bytes) -> bytes:
    return messages.front(head, body) + body


def test_an_order_there_and_back() -> None:
    """Each client gets an order of its own."""
    message = sealed(messages.order_head(ORDER, "a"), wire.pack(ORDER.state))
    own = messages.order_of(message)
    assert bits(vars(own)) == bits(vars(ORDER) | {"clients": ("a",), "since": {"a": 2}})


def test_a_reply_there_and_back() -> None:
    message = sealed(messages.reply_head(REPLY), wire.pack(REPLY.update))
    assert bits(messages.reply_of(message)) == bits(REPLY)


def test_the_length_does_not_depend_on_how_a_number_is_written() -> None:
    lengths = [
        len(messages.front(messages.reply_head(Reply("a", 3, metrics={"loss": loss})), b""))
        for loss in (0.5, 1 / 3, 1e-7)
    ]
    assert len(set(lengths)) == 1


@pytest.mark.parametrize("change", [lambda m: m[:-1], lambda m: m + b"x", lambda m: b"", lambda m: b"LEFT" + m[4:]])
def test_damage_is_refused(change: object) -> None:
    message = sealed(messages.reply_head(REPLY), wire.pack(REPLY.update))
    with pytest.raises(RunError, match="its beginning does not fit its length"):
        messages.reply_of(change(message))  # type: ignore[operator]
