"""tensorboard: event files in the run folder's `tensorboard/`; look with `tensorboard --logdir runs`."""

from collections.abc import Mapping
from pathlib import Path

from weft.job import Job
from weft.trackers.tracker import Calls, parameters


def tensorboard(folder: Path, job: Job) -> Calls:
    """Open the event files of a run; a resumed one goes on in a further file."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("job", "\n".join(f"    {key}: {value}" for key, value in parameters(job).items()))

    def keep(method: str, round_: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{method}/{name}", value, round_)

    return Calls(keep, writer.close)
