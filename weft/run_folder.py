"""The folder of a run: refuse one that a run may not have, before anything is loaded or written."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.adapters.folder import adapter_files
from weft.core.errors import JobError, PolicyError
from weft.core.types import Adapter, Tensors
from weft.files import make_folder, write_safely
from weft.job import Job, load


def check_folder(folder: Path, job: Job, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run, before anything is loaded or written."""
    if resume and overwrite:
        raise JobError("--resume and --overwrite exclude each other; give one")
    _check_place(folder)
    start = folder / "run.json"
    if resume and not start.is_file():
        raise JobError(f"{folder}: there is no run to resume; leave out --resume, or name its folder with --out")
    if not start.is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise JobError(f"--out {folder}: is not empty and not a run; choose another folder")
        return
    if overwrite:
        return
    if not resume:
        raise PolicyError(f"{folder} already holds a run; go on with --resume, or choose another folder with --out")
    if read_json(start).get("job") != job.hash():
        changed = ", ".join(_changed(load(folder / "job.yaml").resolved(), job.resolved()))
        raise PolicyError(f"{folder} holds a run of another job (changed: {changed}); choose another --out")


def _check_place(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise JobError(f"--out {folder}: {place} is a file, not a folder; choose another --out")
    effective = os.access in os.supports_effective_ids
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
        raise JobError(f"--out {folder}: {place} cannot be written to; change its permissions or choose another --out")


def _changed(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [row for key in keys for row in _changed(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [path]


def clear(folder: Path) -> None:
    """Delete a run, whose lock we hold."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of a run folder holds; raise JobError where it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise JobError(f"{path} is damaged; run the job again, in another folder or with --overwrite")
    return values


def write_adapter(folder: Path, adapter: Adapter, tensors: Tensors, described: Mapping[str, Any]) -> None:
    """Write the folder of an adapter, each file whole or not at all."""
    make_folder(folder)
    for name, content in adapter_files(adapter, tensors, described).items():
        write_safely(folder / name, content)
