"""What a run folder holds, for its report: read without torch, finished or not."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from weft import journal
from weft.core.errors import JobError

Row = dict[str, Any]

LABELS = {
    "untrained": "Untrained",
    "local": "Local only (mean)",
    "centralized": "Centralized",
    "federated": "Federated",
}
METRICS = {  # name -> (how it is written, the direction of better)
    "loss": ("loss", -1),
    "perplexity": ("perplexity", -1),
    "rouge1": ("ROUGE-1", 1),
    "rouge2": ("ROUGE-2", 1),
    "rougeL": ("ROUGE-L", 1),
    "bleu4": ("BLEU-4", 1),
    "exact_match": ("exact match", 1),
    "accuracy": ("accuracy", 1),
    "macro_f1": ("macro-F1", 1),
    "text_at_1": ("text R@1", 1),
    "text_at_5": ("text R@5", 1),
    "image_at_1": ("image R@1", 1),
    "image_at_5": ("image R@5", 1),
    "reward_margin": ("reward margin", 1),
    "reward_accuracy": ("reward accuracy", 1),
}
MOST_ROWS = 1000  # of a table: more make a page that no browser opens at once
TOLD_BY = ("accuracy", "loss")  # the first of these that a task measures is the headline's


@dataclass(frozen=True)
class Folder:
    """What a run folder holds, as far as it got; what is missing is empty."""

    text: str
    job: Row
    start: Row
    base: Row
    split: Row
    results: Row
    config: Row
    journals: Mapping[str, list[Row]]

    @property
    def methods(self) -> Mapping[str, Row]:
        """Return the final measurements by method; empty before the end."""
        found: Mapping[str, Row] = self.results.get("methods", {})
        return found

    @property
    def rounds(self) -> list[Row]:
        """Return the federated rounds, without the measurement before the first."""
        return [row for row in self.journals["federated"] if row["round"]]

    @property
    def metric(self) -> str:
        """Return the metric that the run is told by."""
        measured = [row["evaluation"] for row in self.journals["federated"] if "evaluation" in row]
        names = [name for entry in (*self.methods.values(), *measured) for name in entry["overall"]]
        return next((name for name in TOLD_BY if name in names), names[0] if names else "loss")

    @property
    def model(self) -> str:
        """Return the last part of the model's name."""
        return str(section(self.job, "model").get("name", "")).rstrip("/").rpartition("/")[2]

    def test_curve(self, method: str, metric: str) -> list[tuple[float, float]]:
        """Return (round, test metric); the final measurement ends it where the rounds were not evaluated."""
        rows = self.journals.get(method, [])
        points = [(row["round"], row["evaluation"]["overall"].get(metric)) for row in rows if "evaluation" in row]
        final = self.methods.get(method, {})
        if rows and final and "own" not in final and points and points[-1][0] < rows[-1]["round"]:
            points.append((rows[-1]["round"], final["overall"].get(metric)))
        return [(number, value) for number, value in points if value is not None]


def read(folder: Path) -> Folder:
    """Read a run folder; raise JobError where there is none."""
    job = folder / "job.yaml"
    if not job.is_file():
        raise JobError(f"{folder} is not a run folder: it has no job.yaml")
    text = job.read_text(encoding="utf8")
    files = ("run", "base", "split", "results", "adapter/adapter_config")
    start, base, split, results, config = (_json(folder / f"{name}.json") for name in files)
    journals = {"federated": journal.read(folder / "journal.jsonl")}
    for path in sorted(folder.glob("baselines/*/journal.jsonl")):
        journals[path.parent.name] = journal.read(path)
    return Folder(text, yaml.safe_load(text) or {}, start, base, split, results, config, journals)


def _json(path: Path) -> Row:
    found: Row = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    return found


def section(job: Row, key: str) -> Row:
    """Return a section of a job; an empty one where it is missing or null."""
    found: Row = job.get(key) or {}
    return found


def label(metric: str) -> str:
    """Return a metric as people write it, with the direction of better.

    >>> label("rougeL"), label("something")
    ('ROUGE-L, higher is better', 'something')
    """
    text, direction = METRICS.get(metric, (metric, 0))
    return text + {-1: ", lower is better", 0: "", 1: ", higher is better"}[direction]


def better(new: float, old: float, metric: str) -> bool:
    """Tell whether one value of a metric is better than another; of an unknown metric none is.

    >>> better(2.0, 3.0, "loss"), better(2.0, 3.0, "accuracy")
    (True, False)
    """
    return METRICS.get(metric, ("", 0))[1] * (new - old) > 0


def total(rows: Iterable[Row], key: str) -> Any:
    """Return the sum of a number over rows, some of which may lack it."""
    return sum(row.get(key) or 0 for row in rows)


def seconds(rows: Iterable[Row], phase: str) -> float:
    """Return the seconds of a phase in all rounds."""
    return sum(row.get("seconds", {}).get(phase) or 0 for row in rows)
