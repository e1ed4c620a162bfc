"""A job as its real parties prepare it: a site with its own files, the coordinator with neither records nor a model."""

from dataclasses import replace
from pathlib import Path

from weft.clients import Crowd, check, check_cohort, crowd, ranks
from weft.core.errors import KeyProblem
from weft.data.records import Table
from weft.data.split import Split, natural
from weft.job import Job
from weft.prepare import Prepared, check_algorithm, check_base, check_labels, parts, table
from weft.secure.pinned import Pinned

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
        who = crowd(job, clients, lambda records: 1)
        prepared = Prepared(job, task, adapter, plan, AT_THE_SITES, NOTHING, NOTHING, clients, {}, (), who)
        _check_simulated(job, who)
        check(job, who, prepared.facts(), plan.algorithm)
        check_algorithm(prepared)
        return prepared


def _check_simulated(job: Job, who: Crowd) -> None:
    """Refuse what only a simulation can do."""
    if job.clients.pace:
        clause = f"{job.clients.pace.name} goes by a virtual clock, which only a simulation has; leave it out"
        raise KeyProblem(("clients", "pace"), clause)
    if who.sampler.informed:
        name = job.clients.sampler.name
        clause = f"{name} draws by the records or devices of clients, which only a simulation knows beforehand"
        raise KeyProblem(("clients", "sampler"), f"{clause}; choose uniform, round_robin, poisson or availability")


def pinned(job: Job) -> Pinned:
    """Return who takes part in secure aggregation, as the job says it to everyone."""
    peers = {name: job.sites[name].key for name in sorted(job.sites, key=natural)}
    return Pinned(job.hash(), peers, job.clients.per_round or len(peers), job.seed)


def _all(records: Table) -> list[int]:
    return list(range(len(records.records)))
