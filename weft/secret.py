"""The run's private secret: what privacy noise is drawn from. It is in no job, journal, report or message."""

import os
from pathlib import Path

from weft.core.errors import RunError
from weft.files import write_safely

SIZE = 32  # bytes


def secret(folder: Path) -> bytes:
    """Return the secret of a run folder, drawn by the operating system at first; only its owner may read the file.

    It stays, so that a run that is resumed ends in the same bytes. Raise RunError where the file is damaged.
    """
    path = folder / "secret"
    if not path.exists():
        write_safely(path, os.urandom(SIZE), private=True)
    content = path.read_bytes()
    if len(content) != SIZE:
        raise RunError(f"{path} is damaged; without it the noise of earlier rounds is not known: run the job again")
    return content
