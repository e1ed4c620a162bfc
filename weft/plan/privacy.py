"""What a job promises about privacy, before anything is trained."""

from weft.job import Job


def told(job: Job) -> str:
    """Return the epsilon of the whole run, or say why there is none."""
    names = [step.name for step in job.pipeline]
    if "noise" not in names:
        return "none: no step of the pipeline adds noise, so what clients send is not bounded by an epsilon"
    return f"the pipeline ({', '.join(names)}) adds noise; `weft check` says its epsilon"
