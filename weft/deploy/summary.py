"""What a site is shown of a job before it takes part: what runs, what is read, what leaves the building, who else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft import plugins
from weft.core import pipeline
from weft.core.errors import JobError, PolicyError
from weft.core.meeting import threshold
from weft.core.task import Task
from weft.core.types import Wire
from weft.data.records import Table, read
from weft.deploy.own import Own
from weft.deploy.policy import Asked
from weft.job import Job
from weft.site.cohort import Recipe


@dataclass(frozen=True)
class Summary:
    """Rows for a person, and what the policy looks at."""

    rows: dict[str, str]
    asked: Asked


def summary(job: Job, own: Own) -> Summary:
    """Describe a job to one site; raise PolicyError for one that cannot work, JobError for the site's own files."""
    try:
        task: Task = plugins.build(job.task, "task")
        wire = pipeline.check([(step.name, plugins.build(step, "transform")) for step in job.pipeline])
    except JobError as error:
        raise PolicyError(f"the job cannot work: {error}") from None
    table = _table(job, task, own.train)
    recipe = Recipe(**job.local.model_dump(), rounds=job.rounds)
    steps = recipe.steps_of(len(table.records))
    rows = {
        "job": job.hash(),
        "sites": ", ".join(job.sites),
        "trains": f"{_told(job.adapter)} on {job.model.name} (here {own.model}), task {_told(job.task)}",
        "how": f"{job.algorithm.name}, {job.rounds} rounds, {steps} steps of {job.local.batch} records in each",
        "reads": f"{own.train}: {len(table.records)} records, columns {_columns(job, task, table)}",
        "measures": f"{own.test or 'nothing: no --test file'}, sums over its records leave",
        "leaves": _leaves(job, wire),
        "privacy": _privacy(wire),
        "code": "only that of the installed Weft; what arrives is data",
    }
    return Summary(rows, Asked(job, wire, steps))


def _table(job: Job, task: Task, path: Path) -> Table:
    data = job.data
    return read(
        str(path),
        folder=job.folder,
        columns=data.columns,
        on_bad_record=data.on_bad_record,
        bad_record_cap=data.bad_record_cap,
        limit=data.limit,
        needs=task.needs,
    )


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


def _privacy(wire: Wire) -> str:
    noise = f"noise of {wire.noise:g} times the bound {wire.norm:g}" if wire.noise and wire.norm else "no noise"
    seen = "" if wire.hidden else "; text of records can be computed from single updates"
    return f"{noise}{seen}"
