"""Write a file so that a crash leaves the old one or the new one, whole: temporary, fsync, rename, fsync folder."""

import os
from pathlib import Path

from weft.core.errors import RunError


def write_safely(path: Path, content: bytes) -> None:
    """Replace `path` by `content` durably; raise RunError with path and size where the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path} ({len(content):,} bytes): {error.strerror}; free space and resume"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
