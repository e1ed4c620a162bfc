"""The journal: one JSON object a line, one line a round; a torn last line is as if it were not there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.files import append_safely


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line durably."""
    append_safely(path, json.dumps(row, sort_keys=True).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "round" in row:
            rows.append(row)
    return rows
