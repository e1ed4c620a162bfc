"""Write files so that a crash leaves the old content or the new, whole: temporary, fsync, rename, fsync folder."""

import os
from pathlib import Path
from typing import BinaryIO

from weft.core.errors import RunError
from weft.core.points import point
from weft.signals import held


def write_safely(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace `path` by `content` durably; raise RunError with path and size where the disk refuses.

    private: only its owner may read it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with held():
        try:
            point(f"open:{path.name}")
            with open(temporary, "wb", opener=_own if private else None) as file:
                _put(file, content, path.name)
            point(f"rename:{path.name}")
            os.replace(temporary, path)
            point(f"fsync folder:{path.name}")
            sync_folder(path.parent)
            point(f"written:{path.name}")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _refused(path, content, error) from None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it durably: a new name is gone with the power until its folder is synced."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_folder(path.parent)


def _own(path: str, flags: int) -> int:
    """Open a file that only its owner may read, also where a crash left one."""
    Path(path).unlink(missing_ok=True)
    return os.open(path, flags | os.O_EXCL, 0o600)


def append_safely(path: Path, content: bytes) -> None:
    """Add to a file durably; raise RunError where the disk refuses. A crash may leave a part of `content`."""
    with held():
        try:
            point(f"open:{path.name}")
            new = not path.exists()
            with open(path, "ab") as file:
                _put(file, content, path.name)
            if new:
                point(f"fsync folder:{path.name}")
                sync_folder(path.parent)
            point(f"written:{path.name}")
        except OSError as error:
            raise _refused(path, content, error) from None


def _put(file: BinaryIO, content: bytes, name: str) -> None:
    """Write in two halves: a process may die between them."""
    half = len(content) // 2
    point(f"write:{name}")
    file.write(memoryview(content)[:half])
    file.flush()
    point(f"write:{name}")
    file.write(memoryview(content)[half:])
    file.flush()
    point(f"fsync:{name}")
    os.fsync(file.fileno())


def _refused(path: Path, content: bytes, error: OSError) -> RunError:
    reason = error.strerror or str(error)
    return RunError(f"cannot write {path} ({len(content):,} bytes): {reason}; make room or mend the disk, then resume")


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
