"""Ctrl-C and SIGTERM: the write in progress is finished, the next step is not begun; a second signal ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The user or the system asked the process to stop; a KeyboardInterrupt would be caught on the way."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class _Pending:
    """A signal that waits for a write to end, and how many writes are open."""

    writes = 0
    signal: int | None = None


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    if _Pending.writes:
        _Pending.signal = number
    else:
        raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped`, raised between writes."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until what is inside has ended."""
    _Pending.writes += 1
    try:
        yield
    finally:
        _Pending.writes -= 1
    if not _Pending.writes and _Pending.signal is not None:
        number, _Pending.signal = _Pending.signal, None
        raise Stopped(number)
