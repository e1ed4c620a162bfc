"""Workers that pull letters from one queue, one at a time each; what a dead one had goes to another, once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from weft.core.errors import JobError, KeyProblem, PolicyError, RunError, WeftError
from weft.links import letters
from weft.links.letters import Tree

KINDS: dict[str, type[WeftError]] = {kind.__name__: kind for kind in (JobError, RunError, PolicyError)}


class Carrier(Protocol):
    """What brings letters to workers, wherever they are."""

    @property
    def names(self) -> Sequence[str]:
        """Return what each worker is called in a sentence."""

    def send(self, worker: int, letter: bytes) -> None:
        """Give a letter to a worker; one that is gone says nothing here."""

    def receive(self) -> tuple[int, bytes | None]:
        """Wait for any worker: its answer, or None where it is gone."""

    def ended(self, worker: int) -> str:
        """Say how a worker that is gone has ended."""

    def close(self) -> None:
        """End all workers."""


@dataclass
class Crew:
    """Workers with one queue; each has at most one letter, and answers it."""

    carrier: Carrier
    notice: Callable[[str], None] = lambda text: None
    alive: list[int] = field(default_factory=list)
    owed: set[int] = field(default_factory=set)
    """Workers at a letter that nobody waits for any more."""

    def __post_init__(self) -> None:
        self.alive = list(range(len(self.carrier.names)))

    def each(self, letter: bytes) -> list[Any]:
        """Return what every worker answers to the same letter; raise RunError where one is gone."""
        while self.owed:
            self._settle()
        waiting, bodies = set(self.alive), {}
        for worker in self.alive:
            self.carrier.send(worker, letter)
        while waiting:
            worker, content = self.carrier.receive()
            if content is None:
                raise RunError(self._ended(worker))
            bodies[worker] = self._body(worker, content)
            waiting.discard(worker)
        return [bodies[worker] for worker in sorted(bodies)]

    def all(self, letters_: Sequence[Callable[[], bytes]]) -> Iterator[tuple[int, Any]]:
        """Give letters to whoever is free; yield their places and answers as they come.

        Raise RunError where two workers end at the same letter, or none is left.
        """
        queue, given, lost = deque(range(len(letters_))), dict[int, int](), set[int]()
        try:
            while queue or given:
                for worker in [one for one in self.alive if one not in given and one not in self.owed]:
                    if queue:
                        given[worker] = queue.popleft()
                        self.carrier.send(worker, letters_[given[worker]]())
                worker, content = self.carrier.receive()
                self.owed.discard(worker)
                place = given.pop(worker, None)
                if content is None:
                    self._bury(worker, again=place is not None and place not in lost, idle=place is None)
                    if place is not None:
                        lost.add(place)
                        queue.appendleft(place)
                elif place is not None:
                    yield place, self._body(worker, content)
        finally:
            self.owed |= given.keys() & set(self.alive)

    def _settle(self) -> None:
        """Let an answer come that nobody waits for."""
        worker, content = self.carrier.receive()
        self.owed.discard(worker)
        if content is None:
            self._bury(worker, again=False, idle=True)

    def _bury(self, worker: int, *, again: bool, idle: bool) -> None:
        """Go on without a worker, where there is another and the letter was not lost before."""
        self.alive.remove(worker)
        if not self.alive or not (again or idle):
            which = "no worker is left" if not self.alive else "the same work ended another worker before"
            raise RunError(f"{self._ended(worker)}, and {which}; go on with `weft run JOB --resume`")
        self.notice(f"{self._ended(worker)}; " + ("its work is given to another" if again else "the others go on"))

    def _ended(self, worker: int) -> str:
        return f"{self.carrier.names[worker]} {self.carrier.ended(worker)}"

    def _body(self, worker: int, content: bytes) -> Any:
        """Return what a worker answered; raise what failed there."""
        tree = letters.opened(content, ("answer", "failure"), "")
        for text in letters.field_of(tree, "notices", list):
            self.notice(str(text))
        if tree["is"] == "failure":
            raise _failure(self.carrier.names[worker], tree)
        return tree["body"]


def _failure(name: str, tree: Tree) -> WeftError:
    """Return the error of a worker, of the kind that it had there."""
    kind, reason = tree.get("kind"), str(tree.get("reason"))
    if kind == KeyProblem.__name__:
        key, _, clause = reason.partition(": ")
        return KeyProblem((key,), clause)
    if kind in KINDS:
        return KINDS[str(kind)](reason)
    error = RunError(f"{name}: {reason} (a defect of Weft; --debug shows where)")
    error.add_note(str(tree.get("trace")))
    return error
