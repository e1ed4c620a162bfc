"""What a client has opened: for each round the survivors of the sum whose masks it helped to take off, on disk.

Two sums over nearly the same updates and different clients differ by what a single client sent. So a client opens a
round, or an adapter, for one set of survivors only, whatever happens to the server in between.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.core.errors import PolicyError
from weft.files import make_folder, sync_folder


@dataclass
class Ledger:
    """The opened rounds of one client; without a path they are kept in memory alone."""

    path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path and self.path.is_file():
            self.rows = [row for line in self.path.read_bytes().splitlines() for row in _row(line)]

    def open(self, number: int, adapter: bytes, survivors: tuple[str, ...]) -> None:
        """Note, durably, that a round is opened; raise PolicyError where it was opened for other survivors."""
        row = {"round": number, "adapter": adapter.hex(), "survivors": list(survivors)}
        for old in self.rows:
            alike = old["round"] == number or old["adapter"] == row["adapter"]
            if alike and old["survivors"] != row["survivors"]:
                raise PolicyError(
                    f"round {number}: this sum was opened for {', '.join(old['survivors'])}; with other clients the "
                    "difference would show a single update"
                )
        if row not in self.rows:
            self._write(row)
            self.rows.append(row)

    def _write(self, row: dict[str, Any]) -> None:
        if not self.path:
            return
        make_folder(self.path.parent)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(b"\n" + json.dumps(row).encode() + b"\n")  # on a line of its own, whatever a crash left before
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.parent)


def _row(line: bytes) -> list[dict[str, Any]]:
    """Return the row of a line; none for one that a crash tore, whose round was then not opened."""
    try:
        return [json.loads(line)]
    except ValueError:
        return []
