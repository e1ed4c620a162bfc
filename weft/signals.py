"""Ctrl-C and SIGTERM: the write or import in progress is finished, no step is begun; a second signal ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.02  # seconds after which a signal that came in an import is tried again


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
    if _importing(frame):
        # raised here it could be lost: libraries catch what is raised while they load
        signal.signal(signal.SIGALRM, lambda _, later: _stop(number, later))
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
    elif _Pending.writes:
        _Pending.signal = number
    else:
        raise Stopped(number)


def _importing(frame: FrameType | None) -> bool:
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped`, raised between writes and imports."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
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
