"""The memory that a run has needed at most: that of this process and of the workers that it started."""

import resource
from pathlib import Path

PROCESSES = Path("/proc")


def peak_mb() -> float:
    """Return the sum of the peaks of this process and its children, MiB; of this one where the system tells no more."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    children = [number for path in PROCESSES.glob("self/task/*/children") for number in path.read_text().split()]
    return own + sum(map(_peak_of, children))


def _peak_of(process: str) -> float:
    try:
        lines = (PROCESSES / process / "status").read_text().splitlines()
    except OSError:  # it has ended since
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
