"""The scores of each test example, kept where they were measured: what a paired comparison of two runs needs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from weft.core.types import Metrics
from weft.files import make_folder, write_safely


def keep_scores(path: Path, rows: Mapping[str, Sequence[Metrics]]) -> None:
    """Write test group -> one row of sums an example, in the order of the group's records."""
    make_folder(path.parent)
    write_safely(path, json.dumps(rows, sort_keys=True).encode())
