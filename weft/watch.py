"""What a run tells whoever watches it; the default says nothing."""

from typing import Any


class Watch:
    """Silent; a display overrides what it shows."""

    def begin(self, method: str, done: int, rounds: int, clients: int) -> None:
        """Rounds of a method begin, or go on after `done`."""

    def client(self, name: str) -> None:
        """A client has finished its part of an order."""

    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        """A round is committed."""

    def notice(self, text: str) -> None:
        """Something that the user should know and need not act on."""

    def end(self) -> None:
        """The run is finished."""
