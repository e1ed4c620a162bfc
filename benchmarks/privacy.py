"""What privacy costs: score against epsilon for DP inside each client, and against the number of sites for DP of sites.

    python benchmarks/privacy.py [--data FOLDER] [--seeds 0 1 2]

Banking77 (all 77 intents where --data names the whole of it: train.jsonl and test.jsonl; else the shipped slice of 20
intents and 1,000 records), stories260K with LoRA on q and v and a new head, 4 clients, IID. First a search of learning
rate and clip on a seed of its own, at one epsilon; then the table. Rows are written as they come, and a row that stands
in the file is not run again. Writes benchmarks/results/privacy.{csv,md,png}.
"""

import argparse
import csv
import itertools
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import weft
from weft.privacy import Spent, epsilon

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RULES = ["ffa_lora", "fedavg"]
CLIENTS, ROUNDS, STEPS, BATCH, DELTA = 4, 5, 8, 128, 1e-5
EPSILONS = [2.0, 8.0]
SEARCH = {"seed": 99, "epsilon": 8.0, "lr": [1e-2, 3e-2], "clip": [0.3, 1.0]}
PLAIN_LR = 1e-2
SITES = [100, 300, 1_000, 3_000, 10_000]
FIELDS = ["part", "rule", "epsilon", "noise", "clip", "lr", "sites", "seed", "accuracy", "loss", "trainable", "seconds"]


def noise_for(target: float, rate: float, steps: int) -> float:
    """Return the least noise, to a hundredth, that keeps epsilon within a target."""
    low, high = 0.2, 50.0
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon((Spent(middle, rate, steps),), DELTA).value <= target else (middle, high)
    return math.ceil(high * 100) / 100


def job(data: Path, row: dict[str, Any]) -> weft.Job:
    local: dict[str, Any] = {"lr": row["lr"], "batch": BATCH, "steps": STEPS}
    pipeline: list[Any] = [{"weigh": {"by": "uniform"}}]
    if row["part"] in ("search", "record"):
        local["dp"] = {"clip": row["clip"], "noise": row["noise"]}
    if row["part"] == "site":  # noise of z C / n on the mean, as n sites would have: on the sum of ours z C ours / n
        multiplier = row["noise"] * CLIENTS / row["sites"]
        pipeline = ["delta", {"clip": {"norm": row["clip"]}}, *pipeline, {"noise": {"multiplier": multiplier}}]
    return weft.Job(
        model={"name": str(ROOT / "examples" / "models" / "stories260K")},
        adapter={"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}},
        task={"classification": {"max_length": 32}},
        data={
            "train": str(data / "train.jsonl"),
            "test": str(data / "test.jsonl"),
            "split": {"iid": {"clients": CLIENTS}},
        },
        local=local,
        privacy={"delta": DELTA},
        algorithm=row["rule"],
        pipeline=pipeline,
        rounds=ROUNDS,
        evaluate={"every": 0, "batch": 128},
        baselines=[],
        seed=row["seed"],
    )


def planned(records: int, seeds: list[int], best: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Return the rows to run; those of the table wait for what the search found best."""
    smallest = records // CLIENTS
    rate, steps = BATCH / smallest, ROUNDS * STEPS
    searched = noise_for(SEARCH["epsilon"], rate, steps)
    rows = [
        _row("search", rule, SEARCH["epsilon"], searched, clip, lr, 0, SEARCH["seed"])
        for rule, lr, clip in itertools.product(RULES, SEARCH["lr"], SEARCH["clip"])
    ]
    rows += [_row("plain", rule, 0, 0, 0, PLAIN_LR, 0, seed) for seed in seeds for rule in RULES]
    for target in EPSILONS if best else ():
        noise = noise_for(target, rate, steps)
        rows += [_row("record", rule, target, noise, *best[rule][::-1], 0, s) for s in seeds for rule in RULES]
    noise = noise_for(EPSILONS[-1], 1.0, ROUNDS)
    rows += [_row("site", "ffa_lora", EPSILONS[-1], noise, 1.0, PLAIN_LR, n, seeds[0]) for n in SITES]
    return rows


def _row(*values: Any) -> dict[str, Any]:
    return dict(zip(FIELDS, values, strict=False))


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row["part"] if name == "part" else str(row[name]) for name in FIELDS[:8])


def run(data: Path, row: dict[str, Any]) -> dict[str, Any]:
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = weft.run(job(data, row), Path(folder) / "run", threads=1).results
    if row["part"] in ("search", "record"):
        assert results["privacy"][0]["epsilon"] <= row["epsilon"]
    overall = results["methods"]["federated"]["overall"]
    found = {name: f"{overall[name]:.4f}" for name in ("accuracy", "loss")}
    return row | found | {"trainable": results["adapter"]["trainable"], "seconds": f"{time.process_time() - began:.0f}"}


def best_of(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the learning rate and clip of each rule that had the highest accuracy in the search, once it is whole."""
    found = {}
    for rule in RULES:
        tried = [row for row in rows if row["part"] == "search" and row["rule"] == rule]
        if len(tried) < len(SEARCH["lr"]) * len(SEARCH["clip"]):
            return {}
        top = max(tried, key=lambda row: float(row["accuracy"]))
        found[rule] = float(top["lr"]), float(top["clip"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "data" / "banking77")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1000, help="stop after so many new rows; a later call goes on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "privacy.csv"
    done = list(csv.DictReader(path.open(encoding="utf8"))) if path.is_file() else []
    records = len((options.data / "train.jsonl").read_text(encoding="utf8").splitlines())
    for _ in range(options.rows):
        have = {key(row) for row in done}
        left = [row for row in planned(records, options.seeds, best_of(done)) if key(row) not in have]
        if not left:
            break
        done.append({name: str(value) for name, value in run(options.data, left[0]).items()})
        print(*(done[-1][name] for name in FIELDS), flush=True)
        with path.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(done)
        write(done, records)


def write(rows: list[dict[str, Any]], records: int) -> None:
    machine = f"{platform.machine()}, one thread of {os.cpu_count()} cores, torch {torch.__version__}"
    text = (
        "# What privacy costs\n\n"
        f"Banking77, {records:,} training records, {CLIENTS} clients (IID), stories260K, LoRA r=4 on q and v and a "
        f"head; {ROUNDS} rounds of {STEPS} steps, {BATCH} records expected a step, AdamW, uniform weights. Mean and "
        f"standard deviation over seeds. Delta {DELTA:g}. Machine: {machine}. Command: `python "
        "benchmarks/privacy.py --data FOLDER` with the whole of Banking77 in FOLDER.\n\n"
        "## Record-level DP inside each client\n\nThe unit is one record, sampling is Poisson, the accountant PLD. "
        f"Learning rate and clip of each rule come from a search of {len(SEARCH['lr']) * len(SEARCH['clip'])} settings "
        f"at epsilon {SEARCH['epsilon']:g} on another seed, which epsilon does not cover; without DP the rate is "
        f"{PLAIN_LR:g}, not searched.\n\n| rule | epsilon | noise | clip | lr | accuracy | loss |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for part, target in [("plain", "0"), *(("record", str(e)) for e in reversed(EPSILONS))]:
        for rule in RULES:
            cells = [r for r in rows if r["part"] == part and r["rule"] == rule and str(r["epsilon"]) == target]
            if cells:
                told = "none" if part == "plain" else f"{float(target):g}"
                keys_ = " | ".join(str(cells[0][name]) for name in ("noise", "clip", "lr"))
                text += f"| {rule} | {told} | {keys_} | {_cell(cells, 'accuracy')} | {_cell(cells, 'loss')} |\n"
    text += (
        "\n## DP of whole sites\n\nThe unit is a site with all of its records: each update is clipped to 1.0 and the "
        f"sum gets the noise of epsilon {EPSILONS[-1]:g} over {ROUNDS} rounds, all sites in each. The mean of "
        f"{CLIENTS} real clients stands for that of so many sites (ffa_lora, one seed), so that only the noise depends "
        "on their number.\n\n"
        "| sites | noise | accuracy | loss |\n|---|---|---|---|\n"
    )
    for row in (r for r in rows if r["part"] == "site"):
        text += f"| {int(row['sites']):,} | {row['noise']} | {row['accuracy']} | {row['loss']} |\n"
    text += "\n## The search\n\n| rule | lr | clip | accuracy | loss |\n|---|---|---|---|---|\n"
    for row in (r for r in rows if r["part"] == "search"):
        text += f"| {row['rule']} | {row['lr']} | {row['clip']} | {row['accuracy']} | {row['loss']} |\n"
    (RESULTS / "privacy.md").write_text(text, encoding="utf8")
    plot(rows)


def _cell(rows: list[dict[str, Any]], field: str) -> str:
    values = [float(row[field]) for row in rows]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    places = {str(target): i for i, target in enumerate([*EPSILONS, 0])}
    for rule, colour in zip(RULES, ("#2a6fdb", "#c2571a"), strict=True):
        own = [row for row in rows if row["rule"] == rule and row["part"] in ("record", "plain")]
        points = [(places[str(row["epsilon"])], float(row["accuracy"])) for row in own]
        left.scatter([x for x, _ in points], [y for _, y in points], color=colour, s=16)
        means = [(x, statistics.mean(y for at, y in points if at == x)) for x in sorted({x for x, _ in points})]
        left.plot([x for x, _ in means], [y for _, y in means], color=colour, label=rule)
    left.set_xticks(range(len(places)), [*(f"{target:g}" for target in EPSILONS), "no DP"])
    left.set_xlabel("epsilon of one record")
    left.set_ylabel("test accuracy (dots: seeds)")
    left.legend()
    sites = [(int(row["sites"]), float(row["accuracy"])) for row in rows if row["part"] == "site"]
    right.plot([x for x, _ in sites], [y for _, y in sites], "o-", color="#2a6fdb")
    right.set_xscale("log")
    right.set_xlabel(f"sites, at epsilon {EPSILONS[-1]:g} of one site")
    figure.tight_layout()
    figure.savefig(RESULTS / "privacy.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
