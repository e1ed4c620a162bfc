"""Send the rows of a run to trackers while it runs; the journal, a JSON line a round, is always there without any."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weft.core.errors import JobError, near
from weft.job import Job
from weft.watch import Watch

NAMES = ("tensorboard", "mlflow", "wandb")


class Tracker(Protocol):
    """Where the rounds of one run go."""

    def row(self, method: str, round_: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of a method's round."""

    def end(self) -> None:
        """Write what is not written yet."""


Open = Callable[[Path, Job], Tracker]
"""(run folder, job) -> a tracker; a module of this folder has one of its own name."""


@dataclass(frozen=True)
class Calls:
    """A tracker made of two functions."""

    keep: Callable[[str, int, Mapping[str, float]], None]
    close: Callable[[], None]

    def row(self, method: str, round_: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of a method's round."""
        self.keep(method, round_, values)

    def end(self) -> None:
        """Write what is not written yet."""
        self.close()


def opener(name: str) -> Open:
    """Return what opens a tracker by name; raise JobError where it is not known or its package is not there."""
    if name not in NAMES:
        raise JobError(f"--track {name}: there is no such tracker{near(name, NAMES)} (known: {', '.join(NAMES)})")
    if importlib.util.find_spec(name) is None:
        raise JobError(f"--track {name}: the package {name} is not installed; pip install 'weft-fl[{name}]'")
    opened: Open = getattr(importlib.import_module(f"weft.trackers.{name}"), name)
    return opened


class Tracked(Watch):
    """Shows what another watch shows, and sends every row to the trackers; they open with the first round."""

    def __init__(self, shown: Watch, folder: Path, job: Job, names: Sequence[str]) -> None:
        self.shown, self.folder, self.job = shown, folder, job
        self.openers = [opener(name) for name in names]
        self.trackers: list[Tracker] = []

    def begin(self, method: str, done: int, rounds: int, clients: int) -> None:
        """Open the trackers once the run folder is a run."""
        if not self.trackers:
            self.trackers = [open_(self.folder, self.job) for open_ in self.openers]
        self.shown.begin(method, done, rounds, clients)

    def client(self, name: str) -> None:
        """Pass on."""
        self.shown.client(name)

    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        """Send the numbers of a round."""
        values = {key: float(value) for key, value in row.items() if _is_number(value) and key != "round"}
        for tracker in self.trackers:
            tracker.row(method, number, values)
        self.shown.round(method, number, row)

    def notice(self, text: str) -> None:
        """Pass on."""
        self.shown.notice(text)

    def end(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.end()
        self.shown.end()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parameters(job: Job) -> dict[str, str]:
    """Return the keys of a job as trackers list them: one dotted name a value."""
    found: dict[str, str] = {}

    def walk(values: Any, path: str) -> None:
        if isinstance(values, Mapping) and values:
            for key, inside in values.items():
                walk(inside, f"{path}.{key}" if path else str(key))
        else:
            found[path] = str(values)

    walk(job.resolved(), "")
    return found
