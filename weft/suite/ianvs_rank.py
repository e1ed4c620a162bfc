"""all_rank.csv and selected_rank.csv of an imported Ianvs benchmark: the same columns, rows that were there stay."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from weft.files import write_safely
from weft.importers.ianvs import METRICS
from weft.suite.leaderboard import Leaderboard
from weft.suite.run import CELLS

Record = dict[str, str]
NUMBER = 4  # digits that Ianvs keeps of a metric


def write_ranks(board: Leaderboard) -> None:
    """Write both files into the suite's folder; the source's own file is read, and never written."""
    keys: Mapping[str, Any] = board.suite.keys.ianvs or {}
    old = _existing(keys.get("existing"))
    new = [_record(board, name, case) for name, case in keys["cases"].items()]
    records = _sorted([*old, *[one for one in new if one]], keys.get("sort_by") or [])
    columns = list(dict.fromkeys(name for one in [*old[:1], *new, *old] for name in one))
    write_safely(board.folder / "all_rank.csv", _text(_numbered(records), columns).encode())
    chosen, some = _selected(records, columns, keys.get("selected") or {})
    write_safely(board.folder / "selected_rank.csv", _text(_numbered(chosen), some).encode())


def _existing(path: str | None) -> list[Record]:
    if not path:
        return []
    with open(path, encoding="utf8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _record(board: Leaderboard, name: str, case: Mapping[str, Any]) -> Record:
    """Return a finished case as a row, metrics averaged over seeds; nothing where it is not finished."""
    row = next((one for one in board.rows if one.method == "federated" and one.name == name), None)
    if row is None or not row.results:
        return {}
    cells = [cell.folder for cell in board.suite.cells if cell.variant == name]
    ended = max(
        place.stat().st_mtime for folder in cells if (place := board.folder / CELLS / folder / "results.json").is_file()
    )
    means = {name: row.mean(metric) for name, metric in METRICS.items()}
    return {
        "rank": "",
        "algorithm": case["algorithm"],
        **{name: "" if value is None else str(round(value, NUMBER)) for name, value in means.items()},
        "paradigm": case["paradigm"],
        **case["modules"],
        **{key: str(value) for key, value in case["hyperparameters"].items()},
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ended)),
        "url": case["url"],
    }


def _sorted(records: Sequence[Record], sort_by: Sequence[Sequence[str]]) -> list[Record]:
    """Sort by the first key, ties by the next; anything but `ascend` is descending, rows without a value last."""
    found = list(records)
    for name, way in reversed(sort_by):
        sign = 1 if way == "ascend" else -1
        found.sort(key=lambda row, name=name, sign=sign: (not row.get(name), sign * float(row.get(name) or 0)))  # type: ignore[misc]
    return found


def _numbered(records: Sequence[Record]) -> list[Record]:
    return [{**row, "rank": str(place)} for place, row in enumerate(records, start=1)]


def _selected(
    records: Sequence[Record], columns: Sequence[str], chosen: Mapping[str, Any]
) -> tuple[list[Record], list[str]]:
    """Keep the columns that the benchmark selects, and of rows that differ in time or url alone the first."""
    metrics, wanted = list(METRICS), [name for part in chosen.values() for name in part or ()]
    modules = [name for name in columns if any(other.startswith(f"{name}-") for other in columns)]
    hidden = {
        "metrics": [name for name in metrics if "all" not in (chosen.get("metrics") or ["all"]) and name not in wanted],
        "modules": [name for name in modules if "all" not in (chosen.get("modules") or ["all"]) and name not in wanted],
        "hyperparameters": [
            name for name in columns
            if "-" in name and "all" not in (chosen.get("hyperparameters") or ["all"]) and name not in wanted
        ],
    }  # fmt: skip
    out = {name for names in hidden.values() for name in names}
    kept = [name for name in columns if name not in out]
    seen: dict[tuple[str, ...], Record] = {}
    for row in records:
        seen.setdefault(tuple(row.get(name, "") for name in kept if name not in ("rank", "time", "url")), row)
    return list(seen.values()), kept


def _text(records: Sequence[Record], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns) or ["rank"], lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
