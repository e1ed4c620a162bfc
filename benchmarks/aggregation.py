"""Aggregation rules side by side on real text: score, bytes, seconds and aggregation error over seeds and skews.

    python benchmarks/aggregation.py [--seeds 0 1 2] [--rounds 10]

Banking77 slice (20 intents), stories260K with LoRA and a new head, 8 clients, splits IID and Dirichlet 0.5 and 0.1.
Every rule has the same local training and the same budget of rounds; nothing is tuned for any of them, so the table
compares rules at one setting and is no ranking of papers. Writes benchmarks/results/aggregation.{csv,md,png}.
"""

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import weft
from weft.core.errors import WeftError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RULES = ["fedavg", "ffa_lora", "rolora", "flora", "flexlora", "fedex_lora", "fedsa_lora"]
BASELINES = "baselines"  # a run of its own, so that the seconds of a rule are those of the rule
SPLITS: dict[str, dict[str, Any]] = {
    "IID": {"iid": {"clients": 8}},
    "Dirichlet 0.5": {"dirichlet": {"alpha": 0.5, "clients": 8}},
    "Dirichlet 0.1": {"dirichlet": {"alpha": 0.1, "clients": 8}},
}
FIELDS = ["split", "rule", "seed", "accuracy", "loss", "mb_up", "mb_down", "seconds", "aggregation_error"]


def job(rule: str, split: dict[str, Any], seed: int, options: argparse.Namespace) -> weft.Job:
    data = ROOT / "examples" / "data" / "banking77"
    return weft.Job(
        model={"name": str(ROOT / "examples" / "models" / "stories260K")},
        adapter={"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        task={"classification": {"max_length": 64}},
        data={"train": str(data / "train.jsonl"), "test": str(data / "test.jsonl"), "split": split},
        local={"lr": 5e-3, "batch": 8, "steps": options.steps, "schedule": "cosine"},
        algorithm="fedavg" if rule == BASELINES else rule,
        rounds=options.rounds,
        evaluate={"every": 0},
        baselines=["untrained", "local", "centralized"] if rule == BASELINES else [],
        seed=seed,
    )


def rows_of(run: weft.Run, split: str, rule: str, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Return the row of a rule, or those of the baselines; they send nothing between clients."""
    errors = [row["aggregation_error"] for row in run.history if row.get("aggregation_error") is not None]
    rows = []
    for method, scores in run.results["methods"].items():
        ours = method == "federated"
        if ours == (rule == BASELINES):
            continue
        rows.append(
            {
                "split": split,
                "rule": rule if ours else method,
                "seed": seed,
                "accuracy": scores["overall"]["accuracy"],
                "loss": scores["overall"]["loss"],
                "mb_up": run.results["bytes"]["up"] / 1e6 if ours else 0.0,
                "mb_down": run.results["bytes"]["down"] / 1e6 if ours else 0.0,
                "seconds": seconds if ours else None,
                "aggregation_error": statistics.mean(errors) if ours and errors else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name, split in SPLITS.items():
                for rule in [BASELINES, *RULES]:
                    out, began = Path(folder) / f"{name}-{rule}-{seed}", time.process_time()
                    try:
                        run = weft.run(job(rule, split, seed, options), out)
                    except WeftError as error:
                        raise SystemExit(f"{name}, {rule}, seed {seed}: {error}") from None
                    rows += rows_of(run, name, rule, seed, time.process_time() - began)
                    print(name, rule, seed, f"{rows[-1]['accuracy']:.3f}", flush=True)
            write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "aggregation.csv", "w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    machine = f"{platform.machine()}, one thread of {os.cpu_count()} cores, torch {torch.__version__}"
    seeds = sorted({row["seed"] for row in rows})
    text = (
        "# Aggregation rules at one setting\n\nBanking77 slice (20 intents, guessing 0.05), stories260K, LoRA r=8 and "
        f"a head, 8 clients, {options.rounds} rounds of {options.steps} steps of 8, AdamW 5e-3; mean and standard "
        f"deviation over seeds "
        f"{seeds}. Nothing is tuned for any rule. fedsa_lora and local are means over the clients' own adapters on the "
        f"pooled test set. centralized takes the steps of one client, {options.steps} a round, on all records: an "
        f"eighth of the federation's work, and no upper bound here. Machine: {machine}. "
        f"Command: `python benchmarks/aggregation.py`.\n"
    )
    for split in SPLITS:
        text += f"\n## {split}\n\n| rule | accuracy | loss | MB up | MB down | CPU seconds | aggregation error |\n"
        text += "|---|---|---|---|---|---|---|\n"
        for rule in ["untrained", "local", "centralized", *RULES]:
            cells = [row for row in rows if row["split"] == split and row["rule"] == rule]
            text += f"| {rule} | " + " | ".join(_cell(cells, field) for field in FIELDS[3:]) + " |\n"
    (RESULTS / "aggregation.md").write_text(text, encoding="utf8")
    plot(rows)


def _cell(rows: list[dict[str, Any]], field: str) -> str:
    values = [row[field] for row in rows if row[field] is not None]
    if not values:
        return "-"
    mean = statistics.mean(values)
    if field in ("accuracy", "loss"):
        return f"{mean:.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"
    return f"{mean:.1e}" if field == "aggregation_error" else f"{mean:.1f}"


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["local", "centralized", *RULES]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, split in zip(axes, SPLITS, strict=True):
        for place, rule in enumerate(names):
            values = [row["accuracy"] for row in rows if row["split"] == split and row["rule"] == rule]
            axis.bar(place, statistics.mean(values), color="#9aa3b2" if place < 2 else "#2a6fdb")
            axis.scatter([place] * len(values), values, color="#1b2433", s=12, zorder=3)
        axis.set_title(split)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes[0].set_ylabel("test accuracy (dots: seeds)")
    figure.tight_layout()
    figure.savefig(RESULTS / "aggregation.png", dpi=110)


if __name__ == "__main__":
    main()
