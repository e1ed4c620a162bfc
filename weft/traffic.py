"""The traffic: what all messages of a run weighed, read from its journal, and whether another round fits the budget."""

from pathlib import Path

from weft import journal


def rounds(path: Path) -> list[int]:
    """Return the bytes of each finished round, both ways, lost and repeated messages included."""
    return [row["bytes_up"] + row["bytes_down"] for row in journal.read(path) if row["round"]]


def spent(path: Path, megabytes: float | None) -> str | None:
    """Say why no other round is begun; None where it fits the budget, were it as large as the last one."""
    found = rounds(path)
    if megabytes is None or not found or sum(found) + found[-1] <= megabytes * 1e6:
        return None
    return (
        f"budget.megabytes: {sum(found) / 1e6:.3f} of {megabytes:g} MB are spent after round {len(found)}, and another "
        f"round takes {found[-1] / 1e6:.3f}; the run ends here"
    )
