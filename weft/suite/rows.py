"""Finished cells -> the rows of a leaderboard: one for each variant and one for each baseline, all seeds together."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft import journal
from weft.run_folder import read_json
from weft.suite.run import CELLS
from weft.suite.suite import Cell, Labels, Network, Suite, variant

NAMES = {"untrained": "Untrained", "local": "Local only (mean)", "centralized": "Centralized"}
FREE = ("untrained", "local")
"""Methods that send nothing; in a simulation their orders have bytes all the same."""


@dataclass(frozen=True)
class Point:
    """One evaluation during the rounds."""

    round: int
    bytes: float
    """Sent and received by one client until then."""
    seconds: float
    """Simulated, until then."""
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """What one seed gave."""

    seed: int
    overall: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float]]
    """Test group -> metrics; where every client has an adapter of its own, each client's on its own group."""
    up: float
    """Bytes a client sends in a round."""
    down: float
    total: int
    """Bytes of the whole run, all clients, both ways."""
    trainable: int
    parameters: int
    curve: tuple[Point, ...]
    scores: Path
    """Where the scores of each test example stand, if they do."""
    seconds: float
    """Measured, of the rounds."""
    environment: Mapping[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Row:
    """One row of the leaderboard."""

    method: str
    labels: Labels
    results: Mapping[int, Result]
    wanted: int
    """Seeds that the suite asks for."""

    @property
    def name(self) -> str:
        """Return the row's name."""
        if self.method == "federated":
            return variant(self.labels)
        return ", ".join([NAMES[self.method], *self.labels.values()])

    def values(self, metric: str) -> list[float]:
        """Return a metric of each seed that has it."""
        found = [result.overall.get(metric) for result in self.results.values()]
        return [value for value in found if value is not None]

    def mean(self, metric: str) -> float | None:
        """Return the mean over seeds."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Return the sample standard deviation over seeds; None for fewer than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def of_groups(self, metric: str) -> dict[str, float]:
        """Return the mean over seeds of each test group."""
        names = sorted({name for result in self.results.values() for name in result.groups})
        found: dict[str, float] = {}
        for name in names:
            values = [r.groups[name].get(metric) for r in self.results.values() if name in r.groups]
            known = [value for value in values if value is not None]
            if known:
                found[name] = statistics.fmean(known)
        return found


def rows_of(suite: Suite, folder: Path) -> list[Row]:
    """Return the rows of all variants, then of all baselines; a row without a finished cell has no results."""
    variants: dict[str, list[Cell]] = {}
    for cell in suite.cells:
        variants.setdefault(cell.variant, []).append(cell)
    rows = [
        Row("federated", cells[0].labels, _results(suite, folder, "federated", {c.seed: c.folder for c in cells}), n)
        for cells in variants.values()
        if (n := len(cells))
    ]
    for baseline in suite.baselines:
        found = _results(suite, folder, baseline.method, baseline.carriers)
        labels = baseline.labels if _ambiguous(suite, baseline.method) else {}
        rows.append(Row(baseline.method, labels, found, len(suite.keys.seeds)))
    return rows


def _ambiguous(suite: Suite, method: str) -> bool:
    return sum(baseline.method == method for baseline in suite.baselines) > 1


def _results(suite: Suite, folder: Path, method: str, places: Mapping[int, str]) -> dict[int, Result]:
    jobs = {cell.folder: cell.job.hash() for cell in suite.cells}
    found = {}
    for seed, name in places.items():
        place = folder / CELLS / name
        if not (place / "results.json").is_file():
            continue
        results = read_json(place / "results.json")
        if results.get("job") == jobs[name] and method in results["methods"]:
            found[seed] = _result(place, method, seed, results, suite.keys.network)
    return found


def _result(place: Path, method: str, seed: int, results: Mapping[str, Any], network: Network) -> Result:
    scores = results["methods"][method]
    own = place if method in ("federated", "untrained") else place / "baselines" / method
    rounds = [row for row in journal.read(own / "journal.jsonl") if row["round"]] if method != "untrained" else []
    replies = sum(len(row["clients"]) for row in rounds) or 1
    up, down = (0 if method in FREE else sum(row[f"bytes_{way}"] for row in rounds) for way in ("up", "down"))
    return Result(
        seed=seed,
        overall=scores["overall"],
        groups=scores.get("own") or scores["groups"],
        up=up / replies,
        down=down / replies,
        total=up + down,
        trainable=0 if method == "untrained" else results["adapter"]["trainable"],
        parameters=results["adapter"]["total"],
        curve=tuple(_curve(own, network)) if method == "federated" else (),
        scores=own / "scores" / ("untrained.json" if method == "untrained" else "evaluate.json"),
        seconds=sum(row["seconds"]["round"] for row in rounds if "seconds" in row),
        environment=results["environment"],
        fingerprint=results["adapter"]["fingerprint"],
    )


def _curve(folder: Path, network: Network) -> Iterator[Point]:
    """Yield a point for each evaluation of the rounds, with what a client had sent and waited for by then."""
    sent = seconds = 0.0
    for row in journal.read(folder / "journal.jsonl"):
        clients = list(row.get("clients", {}).values())
        if clients:
            sent += sum(c["bytes_up"] + c["bytes_down"] for c in clients) / len(clients)
            seconds += max(simulated(c, network) for c in clients)
        if "evaluation" in row:
            yield Point(row["round"], sent, seconds, row["evaluation"]["overall"])


def simulated(client: Mapping[str, float], network: Network) -> float:
    """Return the seconds of a client's round: the adapter comes, the client trains, its update goes.

    1 MB down at 8 megabits a second and 0.5 MB up at 4: one second each, and two of training.

    >>> simulated({"bytes_down": 1e6, "bytes_up": 5e5, "seconds": 2.0}, Network(up=4.0, down=8.0))
    4.0
    """
    return (
        client["bytes_down"] * 8e-6 / network.down + client.get("seconds", 0.0) + client["bytes_up"] * 8e-6 / network.up
    )


def examples_of(rows: Sequence[Row], text: bool) -> dict[str, dict[int, dict[str, list[dict[str, float]]]]]:
    """Return row -> seed -> test group -> the sums of each example, of rows that have them for all their seeds.

    text: keep the examples that text was generated for, which alone have a share in ROUGE and BLEU.
    """
    found = {}
    for row in rows:
        if row.results and len(row.results) == row.wanted and all(r.scores.is_file() for r in row.results.values()):
            read = {seed: json.loads(r.scores.read_text(encoding="utf8")) for seed, r in row.results.items()}
            found[row.name] = {
                seed: {g: [one for one in rows if not text or "generated" in one] for g, rows in groups.items()}
                for seed, groups in read.items()
            }
    return found
