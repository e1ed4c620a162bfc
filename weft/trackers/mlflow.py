"""mlflow: one run in the experiment `weft`, at MLFLOW_TRACKING_URI or in the run folder's mlflow.db."""

import os
from collections.abc import Mapping
from pathlib import Path

from weft.job import Job
from weft.trackers.tracker import Calls, parameters


def mlflow(folder: Path, job: Job) -> Calls:
    """Open an MLflow run; a resumed run of the same job goes on in the one that it began."""
    from mlflow import MlflowClient

    place = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    client = MlflowClient(place)
    found = client.get_experiment_by_name("weft")
    where = found.experiment_id if found else client.create_experiment("weft", str((folder / "mlflow").resolve()))
    before = client.search_runs([where], f"tags.weft_job = '{job.hash()}'", max_results=1)
    tags = {"weft_job": job.hash()}
    run = before[0] if before else client.create_run(where, run_name=folder.name, tags=tags)
    for key, value in parameters(job).items() if not before else ():
        client.log_param(run.info.run_id, key, value[:500])

    def keep(method: str, round_: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            client.log_metric(run.info.run_id, f"{method}.{name}", value, step=round_)

    return Calls(keep, lambda: client.set_terminated(run.info.run_id))
