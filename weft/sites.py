"""A job as its real parties prepare it: a site with its own files, the coordinator with neither records nor a model."""

from dataclasses import replace
from pathlib import Path

from weft.clients import Crowd, check_cohort, ranks
from weft.core.errors import KeyProblem
from weft.data.records import Table
from weft.data.split import Split, natural
from weft.job import Job
from weft.prepare import Prepared, check_algorithm, check_base, check_labels, parts, table

NOTHING = Table([], "at the sites", 0, (), "")
AT_THE_SITES = Split(lambda records, seed: {})


def at_site(job: Job, name: str, train: Path, test: Path | None) -> Prepared:
    """Check a job against one real site's own files: all its records are those of one client, which has its name.

    The job's model is the one of this machine. Raise JobError for the first thing that is wrong.
    """
    task, adapter, plan = parts(job)
    check_base(job, task)
    records, held_out = table(job, task, str(train)), NOTHING if test is None else table(job, task, str(test))
    classes = task.classes(records.records)
    check_labels(held_out, classes)
    plan = replace(plan, ranks=ranks(job, adapter, job.sites))
    clients, groups = {name: _all(records)}, {name: _all(held_out)}
    return Prepared(job, task, adapter, plan, AT_THE_SITES, records, held_out, clients, groups, classes, Crowd())


def at_coordinator(job: Job) -> Prepared:
    """Check all of a job that needs neither records nor a model, for the sites that it names."""
    with job.located():
        task, adapter, plan = parts(job)
        names = sorted(job.sites, key=natural)
        if not names:
            raise KeyProblem(("sites",), "is missing: name each site and its public key, from `weft keys new NAME`")
        check_cohort(job, len(names))
        plan = replace(plan, ranks=ranks(job, adapter, job.sites))
        clients: dict[str, list[int]] = {name: [] for name in names}
        prepared = Prepared(job, task, adapter, plan, AT_THE_SITES, NOTHING, NOTHING, clients, {}, (), Crowd())
        _check_simulated(prepared)
        check_algorithm(prepared)
        return prepared


def _check_simulated(prepared: Prepared) -> None:
    """Refuse what only a simulation can do so far."""
    job = prepared.job
    if prepared.federation().wire.hidden:
        raise KeyProblem(("pipeline",), "mask runs in simulation only so far; leave it out between real sites")
    if job.clients.pace:
        raise KeyProblem(("clients", "pace"), "an asynchronous pace runs in simulation only; leave it out")
    if job.clients.sampler.name != "uniform":
        raise KeyProblem(("clients", "sampler"), f"{job.clients.sampler.name} runs in simulation only; choose uniform")


def _all(records: Table) -> list[int]:
    return list(range(len(records.records)))
