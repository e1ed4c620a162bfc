"""One queue, any workers: every letter is answered once, whoever dies on the way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from weft.core.errors import JobError, KeyProblem, PolicyError, RunError
from weft.links import letters
from weft.links.crew import Crew


@dataclass
class Bench:
    """Workers in this process; who got its letter last answers first. `dies`: tells who is gone at a letter."""

    count: int = 3
    dies: Callable[[int, str], bool] = lambda worker, body: False
    fails: dict[str, Exception] = field(default_factory=dict)
    given: list[tuple[int, str]] = field(default_factory=list)
    log: list[tuple[int, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [f"worker {number}" for number in range(self.count)]

    def send(self, worker: int, letter: bytes) -> None:
        assert worker not in {one for one, _ in self.given}, "a worker has two letters"
        self.given.append((worker, letters.opened(letter, ("work",), "")["body"]))
        self.log.append(self.given[-1])

    def receive(self) -> tuple[int, bytes | None]:
        worker, body = self.given.pop()
        if self.dies(worker, body):
            return worker, None
        if error := self.fails.get(body):
            kind = type(error).__name__
            return worker, letters.letter("failure", "", reason=str(error), kind=kind, notices=["said"], trace="x")
        return worker, letters.letter("answer", "", body=body.upper(), notices=[])

    def ended(self, worker: int) -> str:
        return "fell"

    def close(self) -> None:
        raise AssertionError("a crew does not end workers")


def work(*bodies: str) -> list[Callable[[], bytes]]:
    return [partial(letters.letter, "work", "", body=body) for body in bodies]


def answers(crew: Crew, *bodies: str) -> list[str]:
    found = dict(crew.all(work(*bodies)))
    return [found[place] for place in range(len(bodies))]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_letter_is_answered_once(count: int) -> None:
    bench = Bench(count)
    assert answers(Crew(bench), "a", "b", "c") == ["A", "B", "C"]
    assert sorted(body for _, body in bench.log) == ["a", "b", "c"]
    assert {worker for worker, _ in bench.log} == set(range(min(count, 3)))


def test_every_worker_answers_for_itself() -> None:
    assert Crew(Bench(3)).each(work("a")[0]()) == ["A", "A", "A"]


def test_what_a_dead_worker_had_goes_to_another() -> None:
    said: list[str] = []
    crew = Crew(Bench(3, dies=lambda worker, body: worker == 1), said.append)
    assert answers(crew, "a", "b", "c", "d") == ["A", "B", "C", "D"]
    assert crew.alive == [0, 2]
    assert said == ["worker 1 fell; its work is given to another"]


def test_a_letter_that_ends_two_workers_ends_the_run() -> None:
    """The second is alive until it takes the letter; the third must not try as well."""
    crew = Crew(Bench(3, dies=lambda worker, body: body == "b"))
    with pytest.raises(RunError, match="fell, and the same work ended another worker before"):
        answers(crew, "a", "b")
    assert len(crew.alive) == 1


def test_the_last_worker_ends_the_run() -> None:
    with pytest.raises(RunError, match="worker 0 fell, and no worker is left; go on with `weft run JOB --resume`"):
        answers(Crew(Bench(1, dies=lambda worker, body: True)), "a")


def test_a_worker_that_is_gone_cannot_be_asked_what_all_are_asked() -> None:
    with pytest.raises(RunError, match="worker 1 fell"):
        Crew(Bench(2, dies=lambda worker, body: worker == 1)).each(work("a")[0]())


def test_answers_that_nobody_waits_for_are_not_taken_for_others() -> None:
    """The first question is given up after one answer; without `owed` its second would answer the next question."""
    crew = Crew(Bench(2))
    for _ in crew.all(work("a", "b", "c")):
        break
    assert answers(crew, "d", "e") == ["D", "E"]
    for _ in crew.all(work("a", "b")):
        break
    assert crew.each(work("f")[0]()) == ["F", "F"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (JobError("data.train: is bad"), "data.train: is bad"),
        (PolicyError("not here"), "not here"),
        (RunError("it failed"), "it failed"),
        (KeyProblem(("task", "causal_lm"), "is odd"), "task.causal_lm: is odd"),
    ],
)
def test_an_error_keeps_its_kind_and_its_words(error: Exception, text: str) -> None:
    said: list[str] = []
    with pytest.raises(type(error)) as caught:
        answers(Crew(Bench(1, fails={"a": error}), said.append), "a")
    assert type(caught.value) is type(error)
    assert str(caught.value) == text
    assert said == ["said"]


def test_a_defect_is_one_sentence_with_the_trace_beside_it() -> None:
    with pytest.raises(RunError, match=r"^worker 0: no number \(a defect of Weft") as caught:
        answers(Crew(Bench(1, fails={"a": ValueError("no number")})), "a")
    assert caught.value.__notes__ == ["x"]
