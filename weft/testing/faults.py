"""Let a run die at, or its disk refuse from, any one fault point: for tests that resume it and compare bytes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from weft.core.points import listening

DISK = ("open", "write", "fsync", "rename", "fsync folder")
"""Points at which a disk may refuse; the file's name follows."""


class Died(BaseException):
    """Stands for the end of the process: nothing catches it."""


@contextmanager
def dying_at(number: int) -> Iterator[list[str]]:
    """End at the point of this number, from 1; yield the names of the points passed so far. 0: only watch."""
    passed: list[str] = []

    def listen(name: str) -> None:
        passed.append(name)
        if len(passed) == number:
            raise Died(name)

    with listening(listen):
        yield passed


@contextmanager
def refusing_at(number: int, code: int = errno.ENOSPC) -> Iterator[list[str]]:
    """Let the disk refuse from the point of this number on, counted among those of the disk; yield their names."""
    passed: list[str] = []

    def listen(name: str) -> None:
        if name.partition(":")[0] not in DISK:
            return
        passed.append(name)
        if len(passed) >= number:
            raise OSError(code, os.strerror(code), name)

    with listening(listen):
        yield passed
