"""wandb: one run in the project `weft`, in the run folder until `wandb sync`; WANDB_MODE=online sends it at once."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.job import Job
from weft.trackers.tracker import Calls


def wandb(folder: Path, job: Job) -> Calls:
    """Open a Weights & Biases run, named by the job's hash: a resumed one goes on in it."""
    import wandb as package

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    run = package.init(
        project="weft",
        name=folder.name,
        dir=str(folder),
        id=job.hash()[:16],
        resume="allow",
        mode=mode,
        config=job.resolved(),
    )

    def keep(method: str, round_: int, values: Mapping[str, float]) -> None:
        run.log({"round": round_} | {f"{method}/{name}": value for name, value in values.items()})

    return Calls(keep, run.finish)
