"""From a job to everything that can be known before training: records, clients, pipeline, plan, site."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft import account, plugins
from weft.baselines import PLAIN, baseline, federation_of, pooled_name
from weft.clients import Crowd, check, check_cohort, check_enough, crowd, paced, ranks
from weft.core import pipeline
from weft.core.errors import JobError, KeyProblem, near
from weft.core.failures import Policy
from weft.core.round import Federation
from weft.core.task import Encoded, Example, Task
from weft.core.types import Adapter, Facts, Link
from weft.data.records import Table, read
from weft.data.split import Split, divide_test, manifest
from weft.job import Job
from weft.links import letters
from weft.links.local import Local
from weft.secure.refusals import refuse
from weft.site.allocator import release
from weft.site.cohort import Cohort, Mode
from weft.site.dpsgd import DpSgd, check_model
from weft.site.lift import virtual_tokens
from weft.site.memory import Memory
from weft.site.model import Base, Loaded, check_files, check_kind, inner_model, load
from weft.site.recipe import Recipe
from weft.site.resident import Resident
from weft.site.selfcheck import choose
from weft.site.shelf import Shelf
from weft.site.site import Plan, Site
from weft.spending import Account
from weft.units import encoded_by_unit, unit_numbers
from weft.watch import Watch

if TYPE_CHECKING:  # cryptography is loaded where updates are masked, and nowhere else
    from weft.secure.member import Member
    from weft.secure.simulated import Simulated

METHODS = ("untrained", "local", "centralized", "federated")


@dataclass(frozen=True)
class Prepared:
    """A job that has been checked against its data; no model is loaded yet."""

    job: Job
    task: Task
    adapter: Adapter
    plan: Plan
    split: Split
    train: Table
    test: Table
    clients: Mapping[str, list[int]]
    groups: Mapping[str, list[int]]
    classes: tuple[str, ...]
    crowd: Crowd

    @property
    def base(self) -> Base:
        """Return the base model as the job names it."""
        model = self.job.model
        return Base(model.name, self.job.folder, model.revision, model.dtype, model.random, model.quantize)

    def federation(self) -> Federation:
        """Return the job's own rounds."""
        names = tuple(self.clients)
        per_round = self.job.clients.per_round or len(names)
        return Federation(
            self.plan.algorithm,
            self.plan.pipeline,
            names,
            per_round,
            self.job.seed,
            self.adapter.products,
            policy=Policy(**self.job.failures.model_dump()),
            sampler=self.crowd.sampler,
            members=self.crowd.members,
            pace=self.crowd.pace,
            downlink=self.plan.downlink,
        )

    @cached_property
    def units(self) -> list[int] | None:
        """Return the number of each training record's unit of privacy; None where that is the record itself."""
        return unit_numbers(self.job, self.train.records)

    def account(self, examples: Mapping[str, int] | None = None) -> Account:
        """Return what the rounds spend of privacy; examples: of each client, where they are known already."""
        sizes = examples or {name: len(chosen) for name, chosen in self.clients.items()}
        shared = account.shared_units(self.clients, self.units)
        return account.account_of(self.job, self.plan.recipe, pipeline.check(self.plan.pipeline), sizes, shared)

    def facts(self) -> Facts:
        """Return what an algorithm may refuse."""
        job, wire = self.job, pipeline.check(self.plan.pipeline)
        return Facts(
            clients=len(self.clients),
            per_round=job.clients.per_round or len(self.clients),
            optimizer=job.local.optimizer,
            weight_decay=job.local.weight_decay,
            momentum=job.local.momentum,
            adapter=job.adapter.name,
            low_rank=self.adapter.products is not None,
            mixed_ranks=any(rank != job.adapter.keys.get("rank") for rank in self.plan.ranks.values()),
            pipeline=tuple(step.name for step in job.pipeline),
            uniform=any(step.name == "weigh" and step.keys["by"] == "uniform" for step in job.pipeline),
            lr=job.local.lr,
            schedule=job.local.schedule,
            warmup=job.local.warmup,
            moments=job.local.moments,
            even=self.crowd.even(job.clients.per_round),
            fixed=self.crowd.sampler.fixed,
            hidden=wire.hidden,
            noise=wire.noise,
            adapts=wire.length is not None,
            names=tuple(self.clients),
            dp=job.local.dp is not None,
        )


def prepare(job: Job) -> Prepared:
    """Check all that can be checked without a model; raise JobError for the first thing that is wrong."""
    with job.located():
        return _prepare(job)


def _prepare(job: Job) -> Prepared:
    task, adapter, plan = parts(job)
    check_base(job, task)
    train, test = tables(job, task)
    assert job.data.split
    split: Split = plugins.build(job.data.split, "split")
    clients = split.assign(train.records, job.seed)
    check_cohort(job, len(clients))
    check_enough(task, clients)
    plan = replace(plan, ranks=ranks(job, adapter, clients))
    groups = divide_test(split, test.records, clients)
    classes = task.classes(train.records)
    check_labels(test, classes)
    who = crowd(job, clients, plan.recipe.steps_of)
    plan = replace(plan, algorithm=paced(plan.algorithm, who.pace))
    prepared = Prepared(job, task, adapter, plan, split, train, test, clients, groups, classes, who)
    check(job, who, prepared.facts(), plan.algorithm)
    check_algorithm(prepared)
    _check_privacy(prepared)
    return prepared


def parts(job: Job) -> tuple[Task, Adapter, Plan]:
    """Return what a job is made of, its pipeline checked."""
    task: Task = plugins.build(job.task, "task")
    adapter: Adapter = plugins.build(job.adapter, "adapter")
    plan = _plan(job, task, adapter)
    pipeline.check(plan.pipeline)
    pipeline.check_down(plan.downlink)
    check_kind(adapter, task)
    return task, adapter, plan


def check_base(job: Job, task: Task) -> None:
    """Refuse a base whose folder cannot be loaded."""
    model = job.model
    check_files(Base(model.name, job.folder, model.revision, model.dtype, model.random, model.quantize), task.reads)


def _check_privacy(prepared: Prepared) -> None:
    """Refuse privacy that means nothing, or that costs more than the job's budget."""
    job, numbers = prepared.job, prepared.units
    if job.local.dp and not prepared.task.per_example:
        clause = f"the loss of {job.task.name} compares the records of a batch, so that no record has one of its own"
        raise KeyProblem(("local", "dp"), f"{clause}; leave local.dp out, or choose another task")
    of = {name: len({numbers[i] for i in rows} if numbers else rows) for name, rows in prepared.clients.items()}
    account.check(job, prepared.account(), of, prepared.federation())


def check_algorithm(prepared: Prepared) -> None:
    """Refuse a job that its algorithm is not defined for."""
    try:
        plan = prepared.plan
        plan.algorithm.check(prepared.facts())
        refuse(pipeline.leaves(plan.pipeline), prepared.facts(), plan.algorithm)
        pipeline.check_algorithm(plan.algorithm, plan.pipeline)
    except KeyProblem:
        raise
    except JobError as error:
        raise KeyProblem(("algorithm",), str(error)) from None


def check_labels(test: Table, classes: Sequence[str]) -> None:
    """Refuse a test label that no training record has, by its place: a label may be private."""
    for place, record in enumerate(test.records if classes else (), start=1):
        if str(record["label"]) not in classes:
            raise JobError(
                f"{test.source}, record {place}: has a label that no training record has; "
                "add such records to data.train, or leave it out"
            )


def _plan(job: Job, task: Task, adapter: Adapter) -> Plan:
    local = job.local.model_dump() | {"dp": job.local.dp and DpSgd(**job.local.dp.model_dump())}
    if job.local.batch < task.least:
        clause = f"{job.task.name} compares the records of a batch with each other; set at least {task.least}"
        raise KeyProblem(("local", "batch"), clause)
    metrics = job.evaluate.on or task.metrics
    for i, metric in enumerate(metrics):
        if metric not in task.metrics:
            clause = f"has no metric `{metric}`{near(metric, task.metrics)} (it has {', '.join(task.metrics)})"
            raise KeyProblem(("evaluate", "on", i), f"{job.task.name} {clause}")
    return Plan(
        task=task,
        adapter=adapter,
        algorithm=plugins.build(job.algorithm, "algorithm"),
        pipeline=[(step.name, plugins.build(step, "transform")) for step in job.pipeline],
        downlink=[(step.name, plugins.build(step, "transform")) for step in job.downlink],
        recipe=Recipe(**local, rounds=job.rounds, everyone=job.clients.per_round is None),
        seed=job.seed,
        evaluate_batch=job.evaluate.batch,
        max_new_tokens=job.evaluate.max_new_tokens,
        generated=job.evaluate.examples,
    )


def tables(job: Job, task: Task) -> tuple[Table, Table]:
    """Read the records of a job, for training and for the test."""
    for key in ("train", "split"):
        if getattr(job.data, key) is None:
            raise KeyProblem(("data", key), "is missing; a simulation needs it, `weft serve` does not")
    if job.data.test is None:
        raise KeyProblem(("data", "test"), "is missing; without held-out records there is nothing to compare")
    assert job.data.train
    return table(job, task, job.data.train), table(job, task, job.data.test)


def table(job: Job, task: Task, source: str) -> Table:
    """Read and check the records of one source of a job."""
    return read(
        source,
        folder=job.folder,
        columns=job.data.columns,
        on_bad_record=job.data.on_bad_record,
        bad_record_cap=job.data.bad_record_cap,
        limit=job.data.limit,
        needs=task.needs,
    )


@dataclass(frozen=True)
class Bench:
    """A loaded base with every client's encoded examples: what the sites of all methods share."""

    prepared: Prepared
    loaded: Loaded
    train: Mapping[str, Encoded]
    test: Mapping[str, Sequence[Example]]
    mode: Mode
    notices: tuple[str, ...]
    simulated: bool = True

    @cached_property
    def examples(self) -> Mapping[str, Sequence[Example]]:
        """Return each client's training examples, which the sites of all methods share."""
        return {name: rows.examples for name, rows in self.train.items()}

    @cached_property
    def secure(self) -> "Simulated | None":
        """Return the clients' and the server's half of secure aggregation, where the pipeline hides updates."""
        if not pipeline.leaves(self.prepared.plan.pipeline).hidden:
            return None
        from weft.secure.simulated import simulate

        job, ours = self.prepared.job.hash(), self.prepared.federation()
        return simulate(job, ours.clients, ours.per_round, ours.seed)

    def site(
        self,
        folder: Path,
        method: str,
        block: int,
        notice: Callable[[str], None],
        members: "Mapping[str, Member] | None" = None,
    ) -> Site:
        """Return the site that trains one method, with its memories under `folder`.

        members: of secure aggregation, by client; simulated where none are given and the pipeline hides updates.
        """
        plan, train = self.prepared.plan, self.examples
        plan = replace(plan, algorithm=baseline(method) or plan.algorithm)
        if method != "federated":
            plan, members = replace(plan, pipeline=PLAIN, downlink=()), {}  # nothing leaves anyone
        elif members is None and self.secure:
            members = self.secure.members(folder / "clients")
        if method == "centralized":
            ranks = {pooled_name(tuple(train)): max(plan.ranks.values())} if plan.ranks else {}
            plan = replace(plan, recipe=replace(plan.recipe, moments="keep"), ranks=ranks)
            train = {pooled_name(tuple(train)): [example for rows in train.values() for example in rows]}
        cohort = Cohort(self.loaded, plan.task, plan.recipe, plan.seed, self.mode, self.loaded.lift, notice)
        kept = Memory(folder / "clients")
        scores = folder / "scores" if self.prepared.job.evaluate.per_example and plan.task.each else None
        return Site(plan, self.loaded, cohort, train, self.test, kept, block, members or {}, scores=scores)

    @property
    def methods(self) -> tuple[str, ...]:
        """Return what a run does, the federation first."""
        return ("federated", *self.prepared.job.baselines)

    def link(self, method: str, folder: Path, block: int, watch: Watch) -> Link:
        """Return the link to the clients of one method, all in this process."""
        site = self.site(folder, method, block, watch.notice)
        site.on_client = watch.client
        return Local([site], job=self.prepared.job.hash())

    def federation(self, method: str) -> Federation:
        """Return the rounds of one method; a baseline is a federation like any other."""
        secure = letters.counted(self.secure.coordinator()) if self.secure else None
        return federation_of(method, self.prepared.federation(), secure)

    def account(self) -> Account:
        """Return what the rounds spend of privacy, by the examples that are trained on."""
        return self.prepared.account({name: len(rows.examples) for name, rows in self.train.items()})

    def manifest(self) -> dict[str, Any]:
        """Return which record went where, with sizes, histograms, distances and truncation."""
        prepared = self.prepared
        result = manifest(
            prepared.clients, prepared.train.records, column=prepared.split.column, seed=prepared.job.seed
        )
        for name, encoded in self.train.items():
            result["clients"][name] |= {"truncated": encoded.truncated, "dropped": encoded.dropped}
        return result | {
            "train": _source(prepared.train),
            "test": _source(prepared.test),
            "test_groups": {name: len(rows) for name, rows in self.test.items()},
        }


def _source(table: Table) -> dict[str, Any]:
    return {
        "records": len(table.records),
        "skipped": table.skipped,
        "bad": list(table.bad),
        "sha256": table.sha256,
    }


def set_up(prepared: Prepared, resident: Resident | None = None) -> Bench:
    """Load the base, or take the resident one, attach the adapter, tokenise every record once."""
    with prepared.job.located():
        return _set_up(prepared, resident)


def _set_up(prepared: Prepared, resident: Resident | None) -> Bench:
    loaded = load(
        prepared.base,
        prepared.adapter,
        prepared.task,
        prepared.classes,
        prepared.job.seed,
        checkpointing=prepared.job.local.checkpointing,
        read=resident.network if resident else None,
    )
    if prepared.job.local.dp:
        check_model(loaded.net)
    room = getattr(loaded.net.config.get_text_config(), "max_position_embeddings", None)
    wanted, extra = prepared.job.task.keys.get("max_length"), virtual_tokens(loaded.net)
    if room and wanted and wanted + extra > room:
        more = f" and the adapter's {extra} virtual tokens" if extra else ""
        at = ("task", prepared.job.task.name, "max_length")
        raise KeyProblem(at, f"{wanted}{more} is more than the model's {room} positions")

    def encoded(records: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> Encoded:
        found = prepared.task.encode(loaded.tokenizer, [records[i] for i in chosen], prepared.classes)
        return replace(found, examples=loaded.referred(prepared.task, found.examples, prepared.plan.evaluate_batch))

    learned, train, shelf = partial(encoded, prepared.train.records), {}, Shelf()
    for name, chosen in prepared.clients.items():
        found = encoded_by_unit(learned, chosen, prepared.units) if prepared.units else learned(chosen)
        train[name] = replace(found, examples=shelf.put(found.examples))
    for name, rows in train.items():
        if not rows.examples:
            raise JobError(
                f"data.train: client {name} has no record to learn from: all {rows.dropped} were cut to nothing by "
                "max_length; raise it"
            )
    test = {name: encoded(prepared.test.records, chosen).examples for name, chosen in prepared.groups.items()}
    engine = Cohort(loaded, prepared.task, prepared.plan.recipe, prepared.job.seed, "single", loaded.lift)
    mode, notice = choose(engine, [row for rows in islice(train.values(), 1000) for row in rows.examples[:8]])
    release()
    return Bench(
        prepared,
        loaded,
        train,
        {name: rows for name, rows in test.items() if rows},
        mode,
        tuple(said for said in (prepared.adapter.notice(inner_model(loaded.net)), notice) if said),
    )
