"""suite.yaml -> cells: a base job, a grid of changes and seeds become one job a cell, all checked before any is run.

    job: ../medquad.yaml              a job file, from the suite's folder, or the job itself
    set: {rounds: 5}                  changes for every cell; keys are those of --set
    grid:
      local.lr: [1e-3, 5e-3]          a key of the job and its values, or
      method:                         a name of your own, and named changes
        LoRA:   {adapter: {lora: {rank: 8}}}
        Prefix: {adapter: prefix, local.lr: 1e-2}
    seeds: [0, 1, 2]

Every value of an axis meets every value of the others. What is measured is the same in all cells: the grid cannot
touch `evaluate` and `data.test`.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft import plugins
from weft.core.errors import JobError, KeyProblem
from weft.job import Job, override_key, put, read_values
from weft.located import Source

FIXED = ("evaluate", "data.test", "seed", "baselines")
NAME = re.compile(r"[a-z_]+(\.[A-Za-z0-9_-]+)*")
Labels = dict[str, str]
"""Axis of the grid -> the value that a cell has on it, as people read it."""


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Network(_Values):
    """The link of every client, for the simulated time."""

    up: Annotated[float, Field(gt=0)] = 10.0
    """Megabits a second."""
    down: Annotated[float, Field(gt=0)] = 50.0


class Bootstrap(_Values):
    """How noise is measured."""

    draws: Annotated[int, Field(ge=100, le=100_000)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


class Keys(_Values):
    """The keys of a suite."""

    job: str | dict[str, Any]
    """The base job: a file, from the suite's folder, or the job itself."""
    set: dict[str, Any] = {}
    """Changes for every cell: key of the job -> value."""
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = {}
    """Key of the job -> values, or a name of your own -> named changes."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)] = [0]
    """Every cell is run once with each."""
    rank_by: str | None = None
    """The metric of the ranking; `accuracy` or `loss` when not given, whichever the task has."""
    network: Network = Network()
    bootstrap: Bootstrap = Bootstrap()
    ianvs: dict[str, Any] | None = None
    """Written by `weft import ianvs`: how all_rank.csv is made."""


@dataclass(frozen=True)
class Cell:
    """One run of a suite: a variant with a seed."""

    labels: Labels
    seed: int
    job: Job

    @property
    def variant(self) -> str:
        """Return what tells this cell's row from the others."""
        return variant(self.labels)

    @property
    def title(self) -> str:
        """Return the cell as errors and progress name it."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Return the name of the cell's run folder: another job, another folder."""
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", self.variant).strip("-.")[:60]
        return f"{plain}-seed{self.seed}-{self.job.hash()[:8]}"


@dataclass(frozen=True)
class Baseline:
    """A baseline that several cells share."""

    method: str
    labels: Labels
    """What those cells have in common."""
    carriers: dict[int, str]
    """Seed -> folder of the cell that runs it for all."""


def variant(labels: Labels) -> str:
    """Write a place in the grid as a row's name."""
    return ", ".join(labels.values()) or "the job"


@dataclass(frozen=True)
class Suite:
    """A suite, read and checked; the cells in the order of the file, seeds innermost."""

    keys: Keys
    cells: tuple[Cell, ...]
    path: Path
    baselines: tuple["Baseline", ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the names of the grid's axes."""
        return tuple(self.keys.grid)

    def ordered(self) -> list[Cell]:
        """Return the cells so that those over one base follow each other."""
        first: dict[str, int] = {}
        for place, cell in enumerate(self.cells):
            first.setdefault(_base(cell.job), place)
        return sorted(self.cells, key=lambda cell: first[_base(cell.job)])


def load_suite(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite and check the job of every cell; raise JobError with file, line and key, or with the cell."""
    values, lines = read_values(path, "suite", "job, grid and seeds")
    source = Source(path.name, lines)
    try:
        keys = _keys(values)
        base, folder = _base_job(keys, path)
        for override in overrides:
            override_key(base, override)
    except KeyProblem as problem:
        raise source.locate(problem) from None
    return with_baselines(Suite(keys, tuple(_cells(keys, base, folder, path.name)), path))


def _keys(values: Mapping[str, Any]) -> Keys:
    try:
        keys = Keys(**values)
    except ValidationError as error:
        raise plugins.problem(error, Keys, dict(values), ()) from None
    for axis, choices in keys.grid.items():
        touched = [axis] if isinstance(choices, list) else [key for change in choices.values() for key in change]
        for key in touched:
            if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
                raise KeyProblem(("grid", axis), f"`{key}` is the same for all cells; give it under `set` or `seeds`")
        if not choices:
            raise KeyProblem(("grid", axis), "holds no value; give at least one")
    if len(set(keys.seeds)) < len(keys.seeds):
        raise KeyProblem(("seeds",), "a seed stands there twice; give each once")
    return keys


def _base_job(keys: Keys, path: Path) -> tuple[dict[str, Any], Path]:
    """Return the values of the base job with the suite's own changes, and where its paths count from."""
    if isinstance(keys.job, str):
        file = path.parent / keys.job
        values, folder = dict(read_values(file)[0]), file.parent
    else:
        values, folder = copy.deepcopy(keys.job), path.parent
    for key, value in keys.set.items():
        _put(values, key, value, f"set.{key}")
    return values, folder


def _put(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    if not NAME.fullmatch(key):
        raise JobError(f"{source}: `{key}` is no key of a job; write it as local.lr")
    put(values, key.split("."), copy.deepcopy(value), source)


def _cells(keys: Keys, base: Mapping[str, Any], folder: Path, name: str) -> Iterator[Cell]:
    axes = [list(_choices(axis, values)) for axis, values in keys.grid.items()]
    for chosen in product(*axes):
        labels = {axis: label for axis, (label, _) in zip(keys.grid, chosen, strict=True)}
        for seed in keys.seeds:
            values = copy.deepcopy(dict(base))
            for _, change in chosen:
                for key, value in change.items():
                    _put(values, key, value, f"{name}: grid")
            evaluate = {**(values.get("evaluate") or {}), "per_example": True}
            try:
                job = Job(**{**values, "seed": seed, "evaluate": evaluate}, folder=folder)
            except JobError as error:
                raise JobError(f"{name}: cell `{variant(labels)}`: {error}") from None
            yield Cell(labels, seed, job)


def _choices(axis: str, values: list[Any] | dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (label, changes) for each value of an axis."""
    if isinstance(values, dict):
        yield from values.items()
        return
    labels = [_label(axis, value) for value in values]
    if len(set(labels)) < len(labels):
        labels = [f"{axis.rpartition('.')[2]} {json.dumps(value, sort_keys=True)}" for value in values]
    yield from ((label, {axis: value}) for label, value in zip(labels, values, strict=True))


def _label(axis: str, value: Any) -> str:
    """Name a value of a key: a plug-in by its name, another by key and value.

    >>> _label("adapter", {"lora": {"rank": 8}}), _label("local.lr", 1e-3)
    ('lora', 'lr 0.001')
    """
    last = axis.rpartition(".")[2]
    if isinstance(value, Mapping) and len(value) == 1:
        return str(next(iter(value)))
    if isinstance(value, str) and last in ("adapter", "algorithm", "task", "split"):
        return value
    return f"{last} {value if isinstance(value, str | int | float) else json.dumps(value)}"


# --- baselines: one run for all cells that share what a baseline depends on

IGNORES = {
    "untrained": ("adapter", "clients", "local", "algorithm", "pipeline", "rounds"),
    "local": ("algorithm", "pipeline"),
    "centralized": ("algorithm", "pipeline", "clients"),
}
"""Baseline -> the sections of a job that change nothing in it."""


def depends(job: Job, method: str) -> str:
    """Return what a baseline depends on, the seed apart, as text that two equal ones share."""
    values = job.resolved()
    if method == "local":  # all clients train, whatever a round's number is; their ranks count
        values["clients"] = values["clients"]["ranks"]
    left_out = {*IGNORES[method], "baselines", "seed"}
    return json.dumps({key: value for key, value in values.items() if key not in left_out}, sort_keys=True)


def with_baselines(suite: Suite) -> Suite:
    """Let the first of the cells that share a baseline run it, and the others not."""
    cells: list[Cell] = []
    found: dict[tuple[str, str], Baseline] = {}
    for cell in suite.cells:
        shared = {method: (method, depends(cell.job, method)) for method in cell.job.baselines}
        for method, key in shared.items():
            before = found.get(key, Baseline(method, cell.labels, {}))
            found[key] = replace(before, labels=_common(before.labels, cell.labels))
        own = [method for method, key in shared.items() if cell.seed not in found[key].carriers]
        cells.append(replace(cell, job=_with(cell.job, own)))
        for method in own:
            found[shared[method]].carriers[cell.seed] = cells[-1].folder
    return replace(suite, cells=tuple(cells), baselines=tuple(found.values()))


def _common(left: Labels, right: Labels) -> Labels:
    return {axis: label for axis, label in left.items() if right.get(axis) == label}


def _with(job: Job, baselines: Sequence[str]) -> Job:
    return job.model_copy(update={"baselines": tuple(baselines)})


def _base(job: Job) -> str:
    """Return what makes a base another one, once loaded; a classifier's new head and random weights have a seed."""
    drawn = job.seed if job.model.random or job.task.name == "classification" else None
    return json.dumps([job.model.model_dump(mode="json"), job.task.name, drawn])
