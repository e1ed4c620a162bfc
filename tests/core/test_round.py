"""One round: who is asked, what counts, what is refused and in which words."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from weft.algorithms.fedavg import fedavg
from weft.core.errors import RunError
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
        "aggregation_error": None,
        "drift": 2.0,
        "cosine": 1.0,
        "bytes_up": 21,
        "bytes_down": 41,
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
        (swap(update={}), "client b: adapter/w is not in all updates alike"),
        (swap(update={"delta": {"w": torch.ones(1)}}), "client b: .* is not in all updates alike"),
        (swap(update=value(40000.0)), "client b: adapter/w holds a value that is not below 32768"),
        (swap(weight=0), "client b: a weight of 0 does not fit"),
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
