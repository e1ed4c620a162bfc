"""The leaderboard of a suite: rows ranked by one metric, beside how sure the ranking is, as CSV, Markdown and JSON.

leaderboard.csv, .md and .json hold no time and no memory: a suite that was stopped and started again gives the same
bytes. What a clock says stands in timings.csv and on the page.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft import plugins
from weft.core.errors import JobError, near
from weft.files import write_safely
from weft.report.folder import METRICS, TOLD_BY
from weft.suite.bootstrap import Difference, difference, holm, scores_of_draws
from weft.suite.rows import Row, examples_of, rows_of
from weft.suite.suite import Suite

TEXT = ("rouge1", "rouge2", "rougeL", "bleu4")
DIGITS = 6


@dataclass(frozen=True)
class Leaderboard:
    """A ranked suite."""

    suite: Suite
    folder: Path
    rows: tuple[Row, ...]
    """Best first; rows without a result last."""
    metric: str
    """The metric of the ranking."""
    metrics: tuple[str, ...]
    best: str
    """The row that the others are compared with: the best of the federated ones."""
    apart: Mapping[str, Difference]
    """Row -> its difference to the best, where both were measured on the same examples and seeds."""
    corrected: Mapping[str, float]
    """Row -> p after Holm's correction."""
    examples: int
    """Test examples that were resampled."""
    failures: Mapping[str, str]

    @property
    def finished(self) -> int:
        """Return how many cells are finished."""
        return sum(len(row.results) for row in self.rows if row.method == "federated")

    def rank(self, row: Row) -> int | None:
        """Return a federated row's rank; None for a baseline, or where there is no result."""
        ranked = [one for one in self.rows if one.method == "federated" and one.mean(self.metric) is not None]
        return ranked.index(row) + 1 if row in ranked else None

    def verdict(self, row: Row) -> str:
        """Say what the comparison with the best row came to."""
        if row.name == self.best:
            return "best"
        if row.name not in self.apart:
            return "not comparable"
        if self.corrected[row.name] > 1 - self.suite.keys.bootstrap.confidence:
            return "no clear difference"
        apart = self.apart[row.name]
        return "better" if METRICS.get(self.metric, ("", 1))[1] * (apart.low + apart.high) > 0 else "worse"


def leaderboard(suite: Suite, folder: Path) -> Leaderboard:
    """Read what is finished, rank it and measure the noise."""
    found = rows_of(suite, folder)
    metrics = tuple(dict.fromkeys(name for row in found for r in row.results.values() for name in r.overall))
    metric = _metric(suite, metrics)
    sign = METRICS.get(metric, ("", 1))[1]
    means = {row.name: row.mean(metric) for row in found}
    rows = sorted(found, key=lambda row: (means[row.name] is None, -sign * (means[row.name] or 0.0)))
    best = next((row.name for row in rows if row.method == "federated" and means[row.name] is not None), "")
    draws, examples = _draws(suite, rows, metric, best)
    confidence = suite.keys.bootstrap.confidence
    apart = {name: difference(draws[name], draws[best], confidence) for name in draws if name != best}
    corrected = holm({name: one.p for name, one in apart.items()})
    path = folder / "failures.json"
    failures = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    return Leaderboard(suite, folder, tuple(rows), metric, metrics, best, apart, corrected, examples, failures)


def _metric(suite: Suite, metrics: Sequence[str]) -> str:
    asked = suite.keys.rank_by
    if asked and metrics and asked not in metrics:
        raise JobError(
            f"{suite.path.name}: rank_by: no cell measured `{asked}`{near(asked, list(metrics))} "
            f"(measured: {', '.join(metrics)})"
        )
    return asked or next((name for name in TOLD_BY if name in metrics), metrics[0] if metrics else "loss")


def _draws(suite: Suite, rows: Sequence[Row], metric: str, best: str) -> tuple[dict[str, Any], int]:
    """Return the score of each paired row in each draw, the best row's first, and how many examples there are."""
    found = examples_of(rows, metric in TEXT)
    if best not in found:
        return {}, 0
    ordered = {best: found.pop(best)} | found
    summarize = plugins.build(suite.cells[0].job.task, "task").summarize
    draws = scores_of_draws(ordered, lambda sums: summarize(sums)[metric], suite.keys.bootstrap.draws)
    return draws, sum(len(rows) for rows in next(iter(ordered[best].values())).values())


# --- files


def write_leaderboard(suite: Suite, folder: Path) -> Leaderboard:
    """Write leaderboard.csv, .md, .json, timings.csv and the page into a suite's folder."""
    from weft.suite.page import page

    board = leaderboard(suite, folder)
    records = [record(board, row) for row in board.rows]
    write_safely(folder / "leaderboard.csv", as_csv(records).encode())
    write_safely(folder / "leaderboard.md", as_markdown(board, records).encode())
    write_safely(folder / "leaderboard.json", as_json(board, records).encode())
    write_safely(folder / "timings.csv", as_csv(timings(board)).encode())
    write_safely(folder / "leaderboard.html", page(board).encode())
    if suite.keys.ianvs is not None:
        from weft.suite.ianvs_rank import write_ranks

        write_ranks(board)
    return board


def record(board: Leaderboard, row: Row) -> dict[str, Any]:
    """Return one row of the table: column -> value, None where there is none."""
    groups = row.of_groups(board.metric)
    first = next(iter(row.results.values()), None)
    apart = board.apart.get(row.name)
    sent = [] if row.method == "centralized" else list(row.results.values())  # there the records travel
    scores: dict[str, Any] = {}
    for metric in board.metrics:
        scores |= {metric: row.mean(metric), f"{metric}_sd": row.deviation(metric)}
    return _rounded(
        {"rank": board.rank(row), "row": row.name, "method": row.method}
        | {f"grid.{axis}": row.labels.get(axis) for axis in board.suite.axes}
        | {"seeds": f"{len(row.results)} of {row.wanted}"}
        | scores
        | {
            f"{board.metric}_lowest_group": min(groups.values(), default=None),
            f"{board.metric}_highest_group": max(groups.values(), default=None),
            "trainable": first.trainable if first else None,
            "trainable_percent": 100 * first.trainable / first.parameters if first else None,
            "bytes_up_a_client_and_round": _mean([r.up for r in sent]),
            "bytes_down_a_client_and_round": _mean([r.down for r in sent]),
            "bytes_in_all": _mean([r.total for r in sent]),
            "difference_to_best_low": apart.low if apart else None,
            "difference_to_best_high": apart.high if apart else None,
            "p_corrected": board.corrected.get(row.name),
            "verdict": board.verdict(row) if row.results else "no result",
        }
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for key, v in values.items()}


def timings(board: Leaderboard) -> list[dict[str, Any]]:
    """Return what a clock said, which differs from run to run."""
    return [
        {
            "row": row.name,
            "seed": seed,
            "seconds_of_the_rounds": round(result.seconds, 3),
            "simulated_seconds": round(result.curve[-1].seconds, 3) if result.curve else None,
        }
        for row in board.rows
        for seed, result in row.results.items()
    ]


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a table as CSV with a header line; an empty field where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]) if records else ["row"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in one.items()} for one in records)
    return text.getvalue()


def as_json(board: Leaderboard, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table with what it was made from."""
    results = [result for row in board.rows for result in row.results.values()]
    return (
        json.dumps(
            {
                "rank_by": board.metric,
                "cells": {"finished": board.finished, "of": len(board.suite.cells)},
                "failures": dict(sorted(board.failures.items())),
                "significance": significance(board),
                "rows": list(records),
                "environment": dict(results[0].environment) if results else {},
                "jobs": {cell.title: cell.job.hash() for cell in board.suite.cells},
            },
            indent=1,
        )
        + "\n"
    )


def as_markdown(board: Leaderboard, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table for reading, mean ± standard deviation over seeds."""
    heads = [
        "",
        "",
        *[METRICS.get(name, (name, 0))[0] for name in board.metrics],
        "trained",
        "bytes",
        "against the best",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---:|---|" + "---:|" * (len(heads) - 3) + "---|"]
    for row, values in zip(board.rows, records, strict=True):
        cells = [
            str(values["rank"] or ""),
            values["row"] + ("" if len(row.results) == row.wanted else f" ({values['seeds']} seeds)"),
            *[plus_minus(values[name], values[f"{name}_sd"]) for name in board.metrics],
            "–" if values["trainable_percent"] is None else f"{values['trainable_percent']:.3g} %",
            "–" if values["bytes_in_all"] is None else f"{values['bytes_in_all']:,.0f}",
            values["verdict"],
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    said = [f"- {cell}: {reason}" for cell, reason in sorted(board.failures.items())]
    failed = ["", "Failed:", "", *said] if said else []
    return "\n".join([*lines, "", significance(board), *failed]) + "\n"


def plus_minus(mean: float | None, deviation: float | None) -> str:
    """Write a mean and its standard deviation.

    >>> plus_minus(0.71234, 0.0123), plus_minus(12.3456, None), plus_minus(None, None)
    ('0.7123 ± 0.0123', '12.35', '–')
    """
    if mean is None:
        return "–"
    places = 2 if abs(mean) >= 10 else 4
    return f"{mean:.{places}f}" + (f" ± {deviation:.{places}f}" if deviation is not None else "")


def significance(board: Leaderboard) -> str:
    """Say what was resampled, and what is not in it."""
    keys, seeds = board.suite.keys.bootstrap, len(board.suite.keys.seeds)
    name = METRICS.get(board.metric, (board.metric, 0))[0]
    if not board.apart:
        return f"Ranked by {name}. Nothing was compared: no two rows are finished on the same examples and seeds."
    drawn = f"the {board.examples:,} test examples" + (
        f" and the {seeds} training seeds, both with replacement and the same for all rows"
        if seeds > 1
        else " with replacement, the same for all rows; with one seed, the noise of training is not in it"
    )
    few = "" if seeds != 1 and seeds > 4 else f" {seeds} seeds say little of how training varies." if seeds > 1 else ""
    return (
        f"Ranked by {name}. Paired bootstrap, {keys.draws:,} draws of {drawn}.{few} Each row is compared with "
        f"{board.best}, the best federated row here; p is corrected for {len(board.apart)} comparisons (Holm). "
        f"'No clear difference' means p above {1 - keys.confidence:.2g}. Rows whose clients each use an adapter of "
        "their own have no common score an example and are not compared."
    )
