"""What a job promises about privacy, before anything is trained."""

from weft import prepare, spending
from weft.core.errors import JobError
from weft.job import Job


def told(job: Job) -> str:
    """Return the epsilon of the whole run, or say why there is none."""
    if not job.local.dp and not any(step.name.endswith("noise") for step in job.pipeline):
        return "none: nothing adds noise (local.dp, or a step of the pipeline), so no epsilon bounds what clients send"
    try:
        prepared = prepare.prepare(job)
        said = spending.told(prepared.account(), prepared.federation(), job.rounds)
    except JobError as error:
        return f"not known before the job can run: {error}"
    return "; ".join(one.removeprefix("privacy: ") for one in said)
