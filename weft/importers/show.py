"""Import, and say on the terminal what became of the keys."""

from pathlib import Path
from typing import Any

from rich.console import Console

from weft.core.errors import JobError, near
from weft.importers.flowertune import import_flowertune
from weft.importers.ianvs import import_ianvs

KINDS = ("ianvs", "flowertune")


def import_shown(kind: str, source: Path, out: Path, *, clients: int, **given: Any) -> None:
    """Write the job into `out`, and name what is not carried over."""
    if kind not in KINDS:
        raise JobError(f"import: there is no `{kind}`{near(kind, KINDS)} (known: {', '.join(KINDS)})")
    if kind == "ianvs":
        notes = import_ianvs(source, out, **given)
    else:
        notes = import_flowertune(source, out, clients=clients, **given)
    console = Console(soft_wrap=True)
    for title, rows in (("different here", notes.changed), ("not carried over", notes.left)):
        for key, said in rows.items():
            console.print(f"{title}: {key}: {said}", markup=False)
    command = "bench" if kind == "ianvs" else "run"
    file = "suite.yaml" if kind == "ianvs" else "job.yaml"
    console.print(f"{len(notes.carried)} keys carried over, see {out / 'IMPORTED.md'}", markup=False)
    console.print(f"weft {command} {out / file}", markup=False)
