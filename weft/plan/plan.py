"""What a run will take, before anything is trained: parameters, bytes, memory, and, with a probe, time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from weft import plugins, prepare
from weft.core.errors import JobError
from weft.core.task import Example, Task
from weft.core.types import Adapter
from weft.data.split import Split
from weft.job import Job
from weft.plan import privacy
from weft.plan.counts import Count, compared, numbers, shapes_of, whole
from weft.plan.memory import Memory, Shape, memory
from weft.plan.skeleton import config, on_meta
from weft.plan.traffic import Traffic, traffic
from weft.site import packing
from weft.site.below import LEAST, layers_below
from weft.site.model import TOKENIZER_FILES, Base, tokenizer_of
from weft.site.recipe import Recipe

MIB = 1024**2
TRIED = 8  # records a place in the batch whose tokens are counted to find the longest
PRIVATE = "memory is that of a step without local.dp, which holds a gradient of the adapter for each example beside it"


@dataclass(frozen=True)
class Records:
    """What is known of the data: clients with their sizes; empty where it could not be read."""

    clients: Mapping[str, int]
    classes: tuple[str, ...]
    longest: Sequence[Mapping[str, Any]]
    """The records with the most text."""
    reason: str = ""
    """Why there is none."""


@dataclass(frozen=True)
class Plan:
    """A job's needs."""

    job: Job
    family: str
    own: Count
    traffic: Traffic
    config: Any
    shape: Shape
    per_round: int | None
    """Clients in a round; None where the data could not be read."""
    steps: tuple[int, int] | None
    """Fewest and most optimizer steps of a client's round."""
    seconds: float | None
    """Of one optimizer step here, from a probe."""
    epsilon: str
    notes: tuple[str, ...]

    @cached_property
    def memory(self) -> Memory:
        """Return the memory of one client's step; it takes a second, and what stands above does not wait for it."""
        return memory(self.config, self.shape)

    @cached_property
    def others(self) -> tuple[Count, ...]:
        """Return what other adapters would train and send."""
        return tuple(compared(self.config, self.shape.task, self.shape.classes))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the tokens of the examples of the micro-batch that memory is counted for."""
        return tuple(len(row["ids"]) for row in self.shape.examples)

    @property
    def in_all(self) -> int | None:
        """Return the bytes of the whole run, all clients, both ways."""
        return (
            None if self.per_round is None else (self.traffic.up + self.traffic.down) * self.per_round * self.job.rounds
        )


def plan(job: Job, *, probe: bool = False) -> Plan:
    """Plan a job from its model's config alone; records are read where they are at hand, weights only to probe."""
    task: Task = plugins.build(job.task, "task")
    adapter: Adapter = plugins.build(job.adapter, "adapter")
    with job.located():
        shape_of, notes = config(job)
        records = _records(job, task)
        classes = len(records.classes) or (2 if task.auto.endswith("SequenceClassification") else 0)
        net = on_meta(shape_of, task, classes, "float32")
        total = sum(p.numel() for p in net.parameters())
        shapes = shapes_of(net, adapter, task)
        own = Count(f"{job.adapter.name} (this job's)", numbers(shapes), total, whole(shapes))
        examples, said = _batch(job, task, records)
        everyone = job.clients.per_round is None
        recipe = Recipe(**job.local.model_dump() | {"dp": None}, rounds=job.rounds, everyone=everyone)
        kept = _kept(net, task) if recipe.repeated else ""
    per_round = (job.clients.per_round or len(records.clients)) if records.clients else job.clients.per_round
    steps = [recipe.steps_of(size) for size in records.clients.values()]
    return Plan(
        job=job,
        family=shape_of.model_type,
        own=own,
        traffic=traffic(plugins.build(job.algorithm, "algorithm"), shapes, [step.name for step in job.pipeline]),
        config=shape_of,
        shape=Shape(adapter, task, recipe, job.model.dtype, classes, examples),
        per_round=per_round,
        steps=(min(steps), max(steps)) if steps else None,
        seconds=_probed(job) if probe else None,
        epsilon=privacy.told(job),
        notes=tuple(filter(None, [*notes, records.reason, said, kept, PRIVATE if job.local.dp else ""])),
    )


def _kept(net: Any, task: Task) -> str:
    """Say what is kept of frozen layers; net: with the adapter in it."""
    layers = layers_below(net) if task.pack and packing.supported(net) else []
    if not layers:
        return ""
    return (
        f"what {len(layers)} frozen layers below the adapter make of each example is computed once and kept, in no "
        f"more memory than the base takes, or {LEAST // MIB} MiB; that is not in the table"
    )


def _records(job: Job, task: Task) -> Records:
    """Read the records and divide them among clients, where the files are there."""
    if job.data.train is None or job.data.split is None:
        return Records({}, (), (), "the records are at the sites: clients are not known")
    file = (job.folder / job.data.train).expanduser()
    if not file.is_file():
        return Records(
            {}, (), (), f"data.train: {job.data.train} is not read: it is no file here; clients are not known"
        )
    try:
        train, _ = prepare.tables(job, task)
        split: Split = plugins.build(job.data.split, "split")
        clients = split.assign(train.records, job.seed)
    except JobError as error:
        return Records({}, (), (), f"the records are not counted: {error}")
    by_text = sorted(train.records, key=lambda record: -sum(len(str(value)) for value in record.values()))
    sizes = {name: len(rows) for name, rows in clients.items()}
    return Records(sizes, task.classes(train.records), by_text[: TRIED * job.local.batch])


def _batch(job: Job, task: Task, records: Records) -> tuple[list[Example], str]:
    """Return the largest micro-batch: of the longest records, or, without them, of whole `max_length`."""
    size = min(job.local.batch, *records.clients.values()) if records.clients else job.local.batch
    base = Base(job.model.name, job.folder, job.model.revision, job.model.dtype, job.model.random)
    if records.longest and any((Path(base.path) / name).is_file() for name in TOKENIZER_FILES):
        encoded = task.encode(tokenizer_of(base), records.longest, records.classes).examples
        if encoded:
            return sorted(encoded, key=lambda row: -len(row["ids"]))[:size], ""
    length = int(job.task.keys.get("max_length") or 512)
    ids = torch.zeros(length, dtype=torch.long)
    worst = {"ids": ids, "labels": ids, "prompt": 0, "label": 0, "reference": ""}
    worst |= {"rejected_ids": ids, "rejected_labels": ids}  # a pair's
    return [worst] * size, f"memory is that of the worst case: every example {length} tokens long, all of them learned"


def _probed(job: Job) -> float:
    """Return the seconds of one optimizer step of one client here: the second of two, the first warms up."""
    import time

    from weft.site.cohort import Cohort
    from weft.threads import TINY

    bench = prepare.set_up(prepare.prepare(job))
    before = torch.get_num_threads()
    if bench.loaded.size < TINY:  # as a run would
        torch.set_num_threads(1)
    try:
        recipe = replace(bench.prepared.plan.recipe, steps=1)
        name, rows = max(bench.train.items(), key=lambda item: len(item[1].examples))
        engine = Cohort(bench.loaded, bench.prepared.task, recipe, job.seed, bench.mode, bench.loaded.lift)
        start = {n: p.detach().cpu()[None].clone() for n, p in bench.loaded.initial.items()}
        for _ in range(2):
            began = time.perf_counter()
            engine.train(1, {name: rows.examples}, start, {}, None)
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
