"""The run's private secret: what privacy noise is drawn from. It is in no job, journal, report or message."""

import os
from pathlib import Path

from weft.core.errors import RunError
from weft.files import sync_folder

SIZE = 32  # bytes


def secret(folder: Path) -> bytes:
    """Return the secret of a run folder, drawn by the operating system at first; only its owner may read the file.

    It stays, so that a run that is resumed ends in the same bytes. Raise RunError where the file is damaged.
    """
    path = folder / "secret"
    if not path.exists():
        _write(path, os.urandom(SIZE))
    content = path.read_bytes()
    if len(content) != SIZE:
        raise RunError(f"{path} is damaged; without it the noise of earlier rounds is not known: run the job again")
    return content


def _write(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(".secret.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    sync_folder(path.parent)
