"""Run the cells of a suite one after the other: finished ones are kept, a failure is named and stops no other."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft import journal, runs
from weft.core.errors import JobError, RunError, WeftError
from weft.files import write_safely
from weft.job import Job
from weft.prepare import prepare
from weft.run_folder import read_json
from weft.site.resident import Resident
from weft.store import locked
from weft.suite.suite import Cell, Suite, load_suite
from weft.watch import Watch

CELLS = "cells"
FAILURES = "failures.json"

Told = Callable[[int, int, str, str], None]
"""(number, of, cell, what happens) for whoever watches."""


@dataclass(frozen=True)
class Finished:
    """A suite's folder after its cells were run."""

    folder: Path
    failures: Mapping[str, str]
    """Cell -> the sentence that says why it failed."""
    loads: int
    """How often a base was read."""


def bench(
    path: Path | str,
    out: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    tables_only: bool = False,
    watch: Watch | None = None,
    tell: Told = lambda number, of, cell, what: None,
    **settings: Any,
) -> Finished:
    """Run a suite into `out` (runs/<name of the suite> when not given), and write its leaderboard.

    Cells that are finished there are never run again; one that was stopped goes on where it was. tables_only: run
    nothing, and write the tables of what is finished. settings: `exact`, `block` and `threads` of `weft.run`.
    Raise JobError for a suite that cannot run, PolicyError while another process is at work in `out`, RunError, once
    all others are done and the tables written, where cells failed.
    """
    suite = load_suite(Path(path), overrides)
    folder = Path(out or Path("runs") / Path(path).stem)
    _check_place(folder)
    with locked(folder):
        write_safely(folder / "suite.yaml", Path(path).read_bytes())
        resident = Resident()
        failures = {} if tables_only else _run_all(suite, folder, resident, watch or Watch(), tell, settings)
        if not tables_only:
            write_safely(folder / FAILURES, json.dumps(failures, indent=1, sort_keys=True).encode())
        from weft.suite.leaderboard import write_leaderboard

        write_leaderboard(suite, folder)
    if failures:
        first, reason = next(iter(failures.items()))
        others = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise RunError(f"{len(failures)} of {len(suite.cells)} cells failed: {first}: {reason}{others}")
    return Finished(folder, failures, resident.loads)


def _check_place(folder: Path) -> None:
    if (folder / "run.json").is_file():
        raise JobError(f"--out {folder}: holds a run, not a suite; choose another folder")
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if others and "suite.yaml" not in others:
        raise JobError(f"--out {folder}: is not empty and not a suite; choose another folder")


def _run_all(
    suite: Suite, folder: Path, resident: Resident, watch: Watch, tell: Told, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Run every cell that is not finished; return the failures by cell."""
    failures: dict[str, str] = {}
    for number, cell in enumerate(suite.ordered(), start=1):
        place = folder / CELLS / cell.folder
        try:
            kept = finished(place, cell.job)
            tell(number, len(suite.cells), cell.title, "finished before" if kept else "running")
            if not kept:
                run_cell(cell, place, watch=watch, resident=resident, **settings)
        except Exception as error:  # whatever happens in one cell, the others are run
            reason = str(error) if isinstance(error, WeftError) else f"{type(error).__name__}: {error}"
            failures[cell.title] = " ".join(reason.split())
            tell(number, len(suite.cells), cell.title, f"failed: {failures[cell.title]}")
    return failures


def run_cell(cell: Cell, place: Path, **settings: Any) -> None:
    """Run one cell, or go on with it; another job's folder is never met, as its name holds the job's hash.

    Its own report is not written: `weft report` does so.
    """
    began = (place / "run.json").is_file()
    if place.is_dir() and not began:
        shutil.rmtree(place)  # a crash before anything was written
    if began and not _same_data(place, cell.job):
        began = False
    place.parent.mkdir(parents=True, exist_ok=True)
    runs.run(cell.job, place, resume=began, overwrite=not began, report=False, **settings)


def finished(place: Path, job: Job) -> bool:
    """Tell whether a cell's folder holds the finished run of this job over the records that are there now."""
    if not (place / "results.json").is_file():
        return False
    return bool(read_json(place / "results.json").get("job") == job.hash()) and _same_data(place, job)


def _same_data(place: Path, job: Job) -> bool:
    split = place / "split.json"
    if not split.is_file():
        return not journal.read(place / "journal.jsonl")
    then, now = read_json(split), prepare(job)
    return bool(then["train"]["sha256"] == now.train.sha256 and then["test"]["sha256"] == now.test.sha256)
