"""One round: who is asked, what counts, what is refused and in which words."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from weft.algorithms.fedavg import fedavg
from weft.core.errors import RunError
from weft.core.failures import Policy
from weft.core.round import Federation, run_round, sample
from weft.core.types import Algorithm, Order, Question, Reply, Server, State
from weft.transforms.weigh import weigh

Change = Callable[[list[Reply]], list[Reply]]


def value(*numbers: float) -> State:
    return {"adapter": {"w": torch.tensor(numbers)}}


@dataclass(frozen=True)
class Scripted:
    """A link whose clients reply 2 and 6 with weights 1 and 3, changed on the way."""

    change: Change = lambda replies: replies

    def exchange(self, order: Order) -> Iterator[Reply]:
        replies = [
            Reply("a", order.round, value(2.0), 1, 1, {"loss": 1.5}, bytes_up=10, bytes_down=20),
            Reply("b", order.round, value(6.0), 3, 3, {"loss": 0.5}, bytes_up=11, bytes_down=21),
        ]
        yield from self.change(replies)

    def ask(self, question: Question) -> Sequence[Any]:
        return []


def federation(
    algorithm: Algorithm | None = None, per_round: int = 2, clients: Sequence[str] = ("a", "b")
) -> Federation:
    return Federation(algorithm or fedavg(), [("weigh", weigh())], tuple(clients), per_round, 7)


def played(change: Change = lambda rows: rows, algorithm: Algorithm | None = None) -> tuple[Server, Any]:
    return run_round(Server(value(0.0)), federation(algorithm), Scripted(change))


def test_a_round_by_hand() -> None:
    """(1 * 2 + 3 * 6) / 4 = 5; the updates 2 and 6 stand 2 from their mean 4 and point the same way."""
    server, record = played()
    assert server.state["adapter"]["w"].tolist() == [5.0]
    assert (server.round, server.since) == (1, {"a": 1, "b": 1})
    assert record == {
        "round": 1,
        "cohort": ["a", "b"],
        "ignored": [],
        "dropped": {},
        "asked_again": {},
        "aggregation_error": None,
        "drift": 2.0,
        "cosine": 1.0,
        "bytes_up": 21,
        "bytes_down": 41,
        "bytes_lost": {},
        "clients": {
            "a": {"weight": 1, "examples": 1, "bytes_up": 10, "bytes_down": 20, "update_norm": 2.0, "loss": 1.5},
            "b": {"weight": 3, "examples": 3, "bytes_up": 11, "bytes_down": 21, "update_norm": 6.0, "loss": 0.5},
        },
    }


def test_duplicates_strangers_and_other_rounds_are_ignored_and_recorded() -> None:
    def change(replies: list[Reply]) -> list[Reply]:
        a, b = replies
        late = replace(b, round=0, update=value(100.0))
        return [late, a, replace(a, update=value(100.0)), replace(a, client="zoe"), b]

    server, record = played(change)
    assert server.state["adapter"]["w"].tolist() == [5.0]
    assert record["ignored"] == ["a", "b", "zoe"]
    assert record["cohort"] == ["a", "b"]


def swap(**parts: Any) -> Change:
    return lambda replies: [replies[0], replace(replies[1], **parts)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap(update=value(float("nan"))), "client b: adapter/w holds a NaN or an infinity; lower the learning rate"),
        (swap(update=value(float("inf"))), "client b: adapter/w holds a NaN or an infinity"),
        (swap(update=value(1.0, 2.0)), r"client b: adapter/w is \(2,\) torch.float32, not \(1,\) torch.float32"),
        (swap(update={"adapter": {}}), "client b: adapter/w is missing"),
        (swap(update={"adapter": {"w": torch.ones(1), "v": torch.ones(1)}}), "client b: adapter/v is not expected"),
        (swap(update={"adapter": {"w": torch.ones(1).half()}}), "client b: .*torch.float16, not"),
        (swap(update={}), "client b: adapter/w is missing"),
        (swap(update={"delta": {"w": torch.ones(1)}}), "client b: adapter/w is missing"),
        (swap(update=value(40000.0)), "client b: adapter/w holds a value that is not below 32768"),
        (swap(weight=0), "client b: a weight of 0 is not one of 1 to 1048576, as weigh has it"),
        (swap(failure="the disk is full"), "client b: the disk is full"),
        (lambda replies: replies[:1], "no reply from b"),
        (lambda replies: [], "no reply from a, b"),
    ],
)
def test_what_is_wrong_is_named(change: Change, words: str) -> None:
    with pytest.raises(RunError, match=f"round 1: {words}"):
        played(change)


def test_a_server_step_that_diverges_is_named() -> None:
    def server(state: State, update: State, tally: Any) -> State:
        return {"adapter": {"w": update["adapter"]["w"] / 0}}

    with pytest.raises(RunError, match="round 1: the server step left a NaN or an infinity in adapter/w"):
        played(algorithm=replace(fedavg(), server=server))


def test_only_what_the_algorithm_sends_leaves_and_since_goes_along() -> None:
    orders: list[Order] = []

    class Watching(Scripted):
        def exchange(self, order: Order) -> Iterator[Reply]:
            orders.append(order)
            yield from super().exchange(order)

    state = {**value(0.0), "secret": {"w": torch.ones(1)}}
    keeping = replace(fedavg(), server=lambda state, update, tally: {**state, **update})
    server, _ = run_round(Server(state, 4, {"b": 3, "gone": 2}), federation(keeping), Watching())
    assert list(orders[0].state) == ["adapter"]
    assert orders[0].since == {"a": 0, "b": 3}
    assert (orders[0].kind, orders[0].round, orders[0].clients) == ("train", 5, ("a", "b"))
    assert server.since == {"a": 5, "b": 5, "gone": 2}
    assert "secret" in server.state


def test_the_aggregation_error_is_recorded_to_six_digits() -> None:
    """The value stands for B and A alike: the mean of w * w is (4 + 3 * 36) / 4 = 28,
    the square of the mean 25: 3 / 28.
    """

    def products(tensors: dict[str, torch.Tensor]) -> Any:
        return {"m": (tensors["w"][:, None], tensors["w"][None])}

    _, record = run_round(Server(value(0.0)), replace(federation(), products=products), Scripted())
    assert record["aggregation_error"] == 0.107143


# --- the cohort

CROWD = tuple(f"client-{number}" for number in range(10))


def test_a_cohort_is_drawn_without_replacement_in_name_order() -> None:
    crowd = federation(per_round=4, clients=CROWD)
    for number in range(1, 50):
        cohort = sample(crowd, number)
        assert list(cohort) == sorted(set(cohort))
        assert len(cohort) == 4
        assert cohort == sample(crowd, number)
    assert sample(crowd, 1) != sample(replace(crowd, seed=8), 1)
    assert sample(replace(crowd, per_round=10), 3) == CROWD


def test_cohorts_are_uniform_enough() -> None:
    """In 2000 rounds each of 10 clients is one of 4 about 800 times; 5 standard deviations are 110."""
    crowd = federation(per_round=4, clients=CROWD)
    seen = Counter(name for number in range(1, 2001) for name in sample(crowd, number))
    assert all(abs(seen[name] - 800) < 110 for name in CROWD)


# --- clients that fail


def under(change: Change, **policy: Any) -> tuple[Server, Any]:
    return run_round(Server(value(0.0)), replace(federation(), policy=Policy(**policy)), Scripted(change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap(failure="the disk is full"), "the disk is full"),
        (swap(update=value(1.0, 2.0)), "adapter/w is (2,) torch.float32, not (1,) torch.float32 as expected"),
        (lambda replies: replies[:1], "no reply"),
        (swap(weight=-1), "a weight of -1 is not one of 1 to 1048576, as weigh has it"),
    ],
)
def test_a_client_that_fails_is_dropped_named_and_not_counted(change: Change, reason: str) -> None:
    """Without b the mean is a's 2; b's memory of this round does not count, so `since` leaves it out."""
    server, record = under(change, on_client_failure="drop")
    assert server.state["adapter"]["w"].tolist() == [2.0]
    assert server.since == {"a": 1}
    assert (record["cohort"], record["dropped"], list(record["clients"])) == (["a", "b"], {"b": reason}, ["a"])


def test_a_wrong_reply_that_comes_first_does_not_make_the_right_ones_wrong() -> None:
    def change(replies: list[Reply]) -> list[Reply]:
        return [replace(replies[1], update={"rubbish": {"w": torch.ones(1)}}), replies[0]]

    server, record = under(change, on_client_failure="drop")
    assert server.state["adapter"]["w"].tolist() == [2.0]
    assert record["dropped"] == {"b": "adapter/w is missing"}


def test_a_nan_has_a_policy_of_its_own() -> None:
    bad = swap(update=value(float("nan")))
    with pytest.raises(RunError, match="client b: adapter/w holds a NaN"):
        under(bad, on_client_failure="drop")
    _, record = under(bad, on_nan="drop")
    assert list(record["dropped"]) == ["b"]


def test_a_quorum_that_is_missed_ends_the_round_with_the_reasons() -> None:
    words = r"round 1: 1 of 2 clients can be counted and failures.quorum asks for 2 \(b: the disk is full\)"
    with pytest.raises(RunError, match=words):
        under(swap(failure="the disk is full"), on_client_failure="drop", quorum=0.6)
    with pytest.raises(RunError, match=r"0 of 2 clients .* asks for 1"):
        under(lambda replies: [], on_client_failure="drop", quorum=0.1)


def test_a_lost_client_is_asked_again_and_alone() -> None:
    asked: list[tuple[str, ...]] = []

    @dataclass(frozen=True)
    class Losing(Scripted):
        def exchange(self, order: Order) -> Iterator[Reply]:
            asked.append(order.clients)
            for reply in super().exchange(order):
                if reply.client in order.clients:
                    yield replace(reply, failure="cut off") if reply.client == "b" and len(asked) < 3 else reply

    retrying = replace(federation(), policy=Policy(on_client_failure="retry", retries=2))
    server, record = run_round(Server(value(0.0)), retrying, Losing())
    assert asked == [("a", "b"), ("b",), ("b",)]
    assert server.state["adapter"]["w"].tolist() == [5.0]
    assert (record["dropped"], record["asked_again"]) == ({}, {"b": "cut off"})
    asked.clear()
    _, record = run_round(Server(value(0.0)), replace(retrying, policy=Policy("retry", retries=1)), Losing())
    assert (record["dropped"], record["asked_again"]) == ({"b": "cut off"}, {"b": "cut off"})


def test_a_nan_is_not_asked_for_again() -> None:
    asked: list[tuple[str, ...]] = []

    @dataclass(frozen=True)
    class Counting(Scripted):
        def exchange(self, order: Order) -> Iterator[Reply]:
            asked.append(order.clients)
            yield from super().exchange(order)

    policy = Policy(on_client_failure="retry", on_nan="drop")
    run_round(Server(value(0.0)), replace(federation(), policy=policy), Counting(swap(update=value(float("nan")))))
    assert asked == [("a", "b")]
