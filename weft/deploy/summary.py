"""What a site is shown of a job before it takes part: what runs, what is read, what leaves the building, who else."""

from dataclasses import dataclass
from typing import Any

from weft.core import pipeline
from weft.core.errors import JobError, PolicyError
from weft.core.meeting import threshold
from weft.core.task import Task
from weft.core.types import Wire
from weft.data.records import Table
from weft.deploy.own import Own
from weft.deploy.policy import Asked
from weft.deploy.told import Told, cost_of, epsilon_of
from weft.job import Job
from weft.prepare import parts, table
from weft.site.recipe import Recipe


@dataclass(frozen=True)
class Summary:
    """Rows for a person, and what the policy looks at."""

    rows: dict[str, str]
    asked: Asked


def summary(job: Job, own: Own) -> Summary:
    """Describe a job to one site; raise PolicyError for one that cannot work, JobError for the site's own files."""
    try:
        task, _, plan = parts(job)
    except JobError as error:
        raise PolicyError(f"the job cannot work: {error}") from None
    wire, records = pipeline.check(plan.pipeline), table(job, task, str(own.train))
    asked = _asked(job, plan.recipe, wire, len(records.records), own)
    rows = {
        "job": job.hash(),
        "sites": ", ".join(job.sites),
        "trains": f"{_told(job.adapter)} on {job.model.name} (here {own.model}), task {_told(job.task)}",
        "how": f"{job.algorithm.name}, {job.rounds} rounds, {asked.steps} steps of {job.local.batch} records in each",
        "reads": f"{own.train}: {asked.records} records, columns {_columns(job, task, records)}",
        "measures": f"{own.test or 'nothing: no --test file'}, sums over its records leave",
        "leaves": _leaves(job, wire),
        "privacy": _privacy(asked, own.policy.delta),
        "code": "only that of the installed Weft; what arrives is data",
    }
    return Summary(rows, asked)


def _asked(job: Job, recipe: Recipe, wire: Wire, records: int, own: Own) -> Asked:
    """Return what a policy looks at, the epsilon by this site's own count."""
    steps, cost = recipe.steps_of(records), cost_of(job, recipe, wire, records)
    if cost is None:
        return Asked(job, wire, steps, records)
    earlier = Told(own.ledger).besides(job.hash())
    told, after = (epsilon_of(earlier, own.policy.delta, cost, rounds) for rounds in (0, job.rounds))
    return Asked(job, wire, steps, records, cost, told, after)


def _columns(job: Job, task: Task, table: Table) -> str:
    """Return the columns that the task reads, by the file's own names."""
    present = {name for record in table.records[:100] for name in record}
    used = next((names for names in task.needs if set(names) <= present), ())
    return ", ".join(job.data.columns.get(name, name) for name in used)


def _told(choice: Any) -> str:
    keys = ", ".join(f"{name} {value}" for name, value in choice.keys.items() if value is not None)
    return f"{choice.name} ({keys})" if keys else str(choice.name)


def _leaves(job: Job, wire: Wire) -> str:
    steps = ", ".join(step.name for step in job.pipeline)
    if not wire.hidden:
        how = "readable by the coordinator; losses, steps, seconds and the number of records"
        return f"after each round the trained adapter, through {steps}, {how}"
    cohort = job.clients.per_round or len(job.sites)
    number = "; the number of records" if job.local.dp else ""
    return (
        f"after each round the trained adapter, its weight and its loss, through {steps}: masked, so that the "
        f"coordinator sees the sum of at least {threshold(cohort)} of {cohort} sites and no site's own{number}"
    )


def _privacy(asked: Asked, delta: float) -> str:
    wire = asked.wire
    if asked.cost:
        earlier = f", {asked.told:.4g} of it from earlier jobs" if asked.told else ""
        return (
            f"epsilon {asked.epsilon:.4g} at delta {delta:g} for {asked.cost.unit} after all rounds{earlier}, by noise "
            "that is added at the sites"
        )
    noise = f"noise of {wire.noise:g} times the bound {wire.norm:g}, by the coordinator" if wire.noise else "no noise"
    seen = "" if wire.hidden else "; text of records can be computed from single updates"
    return f"{noise}{seen}"
