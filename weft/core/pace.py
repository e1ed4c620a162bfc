"""When the server steps without waiting for all: after how many replies, and what a stale one counts."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """An asynchronous server, which steps as soon as `buffer` clients have replied."""

    buffer: int
    factor: Callable[[int], float]
    """Staleness, in steps of the server since a client began -> what its update is multiplied by."""
    from_start: bool = True
    """An update is the difference to the state that the client began with; otherwise to the server's of now."""
