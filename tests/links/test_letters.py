"""Letters: what a site may say of itself and what not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from weft.core.errors import RunError
from weft.core.types import Order, Question, Reply
from weft.links import letters, wire
from weft.testing.sound import bits

JOB = "a" * 64
ORDER = Order(
    "train",
    2,
    ("p", "q"),
    {"adapter": {"w": torch.ones(2)}},
    {"p": 1, "q": 0},
    ("loss",),
    ("p", "q", "r"),
    {"p": b"\x00\xff", "q": b"shares"},
)
REPLY = Reply("p", 2, {"adapter": {"w": torch.zeros(2)}}, 5, 5, {"loss": 1.0}, {"g": {"loss": 2.0}})


def test_an_order_reaches_each_site_with_its_own_clients() -> None:
    fronts, body = letters.order_letters(JOB, ORDER, {"x": ("p",), "y": ("q",)})
    for site, name in (("x", "p"), ("y", "q")):
        got = letters.order_of(letters.opened(fronts[site] + body, ("order",), JOB))
        own = {"since": {name: ORDER.since[name]}, "secure": {name: ORDER.secure[name]}}
        assert bits(got) == bits(replace(ORDER, clients=(name,), **own))


def test_a_reply_comes_back() -> None:
    tree = wire.unseal(wire.seal(letters.reply_tree(REPLY)))
    assert bits(letters.reply_of(tree, ORDER, ("p",))) == bits(REPLY)
    lost = Reply("p", 2, failure="no\nway", not_finite=True)
    assert letters.reply_of(letters.reply_tree(lost), ORDER, ("p",)).failure == "no way"


def test_the_length_does_not_depend_on_how_a_number_is_written() -> None:
    told = [letters.replies_letter(JOB, [replace(REPLY, metrics={"loss": loss})]) for loss in (0.5, 1 / 3, 1e-300)]
    assert len({len(content) for content in told}) == 1


def test_a_damaged_letter_is_a_failure_of_each_client() -> None:
    content = letters.replies_letter(JOB, [REPLY])
    (good,) = letters.replies_of(content, ORDER, ("p",), JOB)
    assert bits(good) == bits(REPLY)
    for wrong in (content[:-1], b"", letters.letter("failure", JOB, reason="no\nroom")):
        lost = letters.replies_of(wrong, ORDER, ("p", "q"), JOB)
        assert [(reply.client, reply.round, bool(reply.failure)) for reply in lost] == [("p", 2, True), ("q", 2, True)]


@pytest.mark.parametrize(
    "change",
    [
        {"client": "q"},
        {"round": 1},
        {"weight": -1},
        {"weight": True},
        {"weight": 2.0},
        {"examples": None},
        {"update": {"adapter": torch.zeros(2)}},
        {"update": {"adapter": {"w": [1.0]}}},
        {"metrics": {"loss": "low"}},
        {"measured": {"g": 1.0}},
        {"failure": 3},
    ],
)
def test_a_reply_of_another_shape_is_refused(
    change: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    letters.reply_of(letters.reply_tree(REPLY), ORDER, ("p",))
    with pytest.raises(RunError) as caught:
        letters.reply_of(letters.reply_tree(REPLY) | change, ORDER, ("p",))
    record_property("said", str(caught.value))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "run"},
        {"state": []},
        {"since": {"p": "x"}},
        {"clients": "p"},
        {"round": -1},
        {"secure": {"p": "\u00e9"}},
        {"secure": {"p": 1}},
    ],
)
def test_an_order_of_another_shape_is_refused(
    change: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    fronts, body = letters.order_letters(JOB, ORDER, {"x": ("p",)})
    with pytest.raises(RunError) as caught:
        letters.order_of(wire.unseal(fronts["x"] + body) | change)
    record_property("said", str(caught.value))


def test_a_letter_of_another_job_is_refused() -> None:
    content = letters.letter("question", "b" * 64, kind="describe", body={})
    assert letters.question_of(letters.opened(content, ("question",), "b" * 64)) == Question("describe", {})
    with pytest.raises(RunError, match="belongs to the job bbbbbbbbbbbb, not to aaaaaaaaaaaa"):
        letters.opened(content, ("question",), JOB)
    with pytest.raises(RunError, match="is none of order"):
        letters.opened(content, ("order",), JOB)
