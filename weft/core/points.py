"""Fault points: named places where a process may die or a disk refuse; nothing happens unless a test listens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


def point(name: str) -> None:
    """Pass a place where a fault is thinkable."""
    for listener in _listeners:
        listener(name)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call a listener, which may raise, at every point that is passed inside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
