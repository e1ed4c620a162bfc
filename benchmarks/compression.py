"""Bytes against score: what each way of sending less costs on real text, over seeds.

    python benchmarks/compression.py [--seeds 0 1 2] [--rounds 10]

Banking77 slice (20 intents), stories260K with LoRA and a head, 8 clients, Dirichlet 0.5. Every row has as many local
steps in all and, where nothing else is said, the same rounds; only what is named is tuned. Bytes are those of whole
messages, both ways, as in the journal. Rows are written as they come, and those that are there are not run again.
Writes benchmarks/results/compression.{csv,md,png}.
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
FIELDS = ["way", "seed", "accuracy", "loss", "up", "down", "seconds"]


def quantize(bits: int, **keys: Any) -> dict[str, Any]:
    return {"quantize": {"bits": bits, **keys}}


def topk(fraction: float, feedback: bool = True) -> dict[str, Any]:
    return {"topk": {"fraction": fraction, "feedback": feedback}}


NF4: dict[str, Any] = {"levels": "normal"}
INT8, SMALL = quantize(8), {"zstd": {"level": 19}}
WIDE = [quantize(4, block=512), SMALL]  # few scales; zstd takes out what is regular in the codes
Way = tuple[str, int, list[Any], list[Any]]
WAYS: dict[str, Way] = {  # name -> algorithm, rank, uplink between delta and weigh, downlink
    "fp32": ("fedavg", 8, [], []),
    "bf16": ("fedavg", 8, [quantize(16)], [quantize(16)]),
    "int8": ("fedavg", 8, [INT8], [INT8]),
    "int4": ("fedavg", 8, [quantize(4)], [quantize(4)]),
    "NF4": ("fedavg", 8, [quantize(4, **NF4)], [quantize(4, **NF4)]),
    "top 10 %, int8 down": ("fedavg", 8, [topk(0.1)], [INT8]),
    "top 10 %, no feedback, int8 down": ("fedavg", 8, [topk(0.1, False)], [INT8]),
    "top 1 %, int8 down": ("fedavg", 8, [topk(0.01)], [INT8]),
    "top 1 %, no feedback, int8 down": ("fedavg", 8, [topk(0.01, False)], [INT8]),
    "top 25 % int4 zstd, int4/512 zstd down": ("fedavg", 8, [topk(0.25), *WIDE], WIDE),
    "r=2 fp32": ("fedavg", 2, [], []),
    "r=2 int4/512 zstd": ("fedavg", 2, WIDE, WIDE),
    "RoLoRA int4/512 zstd": ("rolora", 8, WIDE, WIDE),
    "int4/512 zstd": ("fedavg", 8, WIDE, WIDE),
    "FFA fp32": ("ffa_lora", 8, [], []),
    "FFA int4/512 zstd": ("ffa_lora", 8, WIDE, WIDE),
    "FFA top 25 % int4 zstd, int4/512 zstd down": ("ffa_lora", 8, [topk(0.25), *WIDE], WIDE),
    "fewer rounds, fp32": ("fedavg", 8, [], []),
    "fewer rounds, int4/512 zstd": ("fedavg", 8, WIDE, WIDE),
    "fp32, twice the rate": ("fedavg", 8, [], []),
    "FFA fp32, twice the rate": ("ffa_lora", 8, [], []),
    "FFA int4/512 zstd, twice the rate": ("ffa_lora", 8, WIDE, WIDE),
    "FFA top 50 % int4 zstd, int4/512 zstd down, twice the rate": ("ffa_lora", 8, [topk(0.5), *WIDE], WIDE),
    "FFA top 25 % int4 zstd, int4/512 zstd down, twice the rate": ("ffa_lora", 8, [topk(0.25), *WIDE], WIDE),
}
FEWER = 4  # rounds of those, with as many local steps in all


def rounds_of(name: str, options: argparse.Namespace) -> int:
    return FEWER if name.startswith("fewer rounds") else int(options.rounds)


def job(name: str, seed: int, options: argparse.Namespace) -> weft.Job:
    algorithm, rank, up, down = WAYS[name]
    rounds = rounds_of(name, options)
    data = ROOT / "examples" / "data" / "banking77"
    return weft.Job(
        model={"name": str(ROOT / "examples" / "models" / "stories260K")},
        adapter={"lora": {"rank": rank, "alpha": 2 * rank, "targets": "all-linear"}},
        task={"classification": {"max_length": 64}},
        data={
            "train": str(data / "train.jsonl"),
            "test": str(data / "test.jsonl"),
            "split": {"dirichlet": {"alpha": 0.5, "clients": 8}},
        },
        local={
            "lr": 5e-3 * (2 if "twice" in name else 1),
            "batch": 8,
            "steps": options.steps * options.rounds // rounds,
            "schedule": "cosine",
        },
        algorithm=algorithm,
        pipeline=["delta", *up, "weigh"] if up else ["weigh"],
        downlink=down,
        rounds=rounds,
        evaluate={"every": 0},
        baselines=[],
        seed=seed,
    )


def read() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    path = RESULTS / "compression.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    return [
        {"way": row["way"], "seed": int(row["seed"]), **{name: float(row[name]) for name in FIELDS[2:]}} for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read()
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name in WAYS:
                if any((row["way"], row["seed"]) == (name, seed) for row in rows):
                    continue
                began = time.process_time()
                try:
                    run = weft.run(job(name, seed, options), Path(folder) / f"{len(rows)}")
                except WeftError as error:
                    raise SystemExit(f"{name}, seed {seed}: {error}") from None
                overall, sent = run.results["methods"]["federated"]["overall"], run.results["bytes"]
                numbers = (overall["accuracy"], overall["loss"], sent["up"], sent["down"], time.process_time() - began)
                rows.append({"way": name, "seed": seed, **dict(zip(FIELDS[2:], numbers, strict=True))})
                print(name, seed, f"{overall['accuracy']:.3f}", sent, flush=True)
                write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "compression.csv", "w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / "compression.md").write_text(page(rows, options), encoding="utf8")
    plot(rows)


def of(rows: list[dict[str, Any]], way: str, field: str) -> list[float]:
    return [row[field] for row in rows if row["way"] == way]


def differences(rows: list[dict[str, Any]], way: str) -> list[float]:
    """Return accuracy less that of fp32 with the same seed."""
    plain = {row["seed"]: row["accuracy"] for row in rows if row["way"] == "fp32"}
    return [row["accuracy"] - plain[row["seed"]] for row in rows if row["way"] == way]


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    machine = f"{platform.machine()}, one thread of {os.cpu_count()} cores, torch {torch.__version__}"
    seeds = sorted({row["seed"] for row in rows})
    total = statistics.mean(of(rows, "fp32", "up")) + statistics.mean(of(rows, "fp32", "down"))
    plain = of(rows, "fp32", "accuracy")
    noise = f"varies by {spread(plain):.3f} from seed to seed" if len(plain) > 1 else "was run with one seed only"
    missing = [way for way in WAYS if len(of(rows, way, "seed")) < len(options.seeds)]
    text = (
        "# Bytes against score\n\nBanking77 slice (20 intents, guessing 0.05), stories260K, LoRA r=8 (or named) on all "
        f"layers, a head, 8 clients, Dirichlet 0.5, {options.rounds} rounds of {options.steps} steps, AdamW; mean and "
        f"standard deviation over seeds {seeds}. Kilobytes (10^3): one client and round, whole messages. `less` "
        "is how many times fewer bytes than fp32, both ways together. `to fp32` is the accuracy less that of fp32 with "
        f"the same seed; fp32 itself {noise}. The rate is 5e-3, or twice that where the way says so, which "
        f"was tried since FFA trains one factor of two. Fewer rounds are {FEWER}, "
        f"with as many steps in all. Machine: {machine}. Command: `python benchmarks/compression.py`.\n\n"
        + (f"Not complete: of seeds {options.seeds} some are missing for {', '.join(missing)}.\n\n" if missing else "")
        + "| way | kB up | kB down | less | accuracy | to fp32 | CPU seconds |\n|---|---|---|---|---|---|---|\n"
    )
    for way in WAYS:
        if not (scores := of(rows, way, "accuracy")):
            continue
        up, down = (statistics.mean(of(rows, way, field)) for field in ("up", "down"))
        apart, messages = differences(rows, way), 8 * rounds_of(way, options)
        text += (
            f"| {way} | {up / messages / 1e3:.1f} | {down / messages / 1e3:.1f} | {total / (up + down):.1f} | "
            f"{statistics.mean(scores):.3f} ± {spread(scores):.3f} | "
            f"{statistics.mean(apart):+.3f} ± {spread(apart):.3f} | {statistics.mean(of(rows, way, 'seconds')):.0f} |\n"
        )
    return text


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 5.5))
    plain = of(rows, "fp32", "accuracy")
    axis.axhspan(min(plain), max(plain), color="#e8ecf2", label="fp32, its seeds")
    for number, way in enumerate([way for way in WAYS if of(rows, way, "up")], start=1):
        scores = of(rows, way, "accuracy")
        size = (statistics.mean(of(rows, way, "up")) + statistics.mean(of(rows, way, "down"))) / 1e6
        color = "#c2571a" if way.startswith("FFA") else "#2a6fdb"
        axis.errorbar(size, statistics.mean(scores), spread(scores), fmt="o", color=color, capsize=2)
        axis.annotate(str(number), (size, statistics.mean(scores)), xytext=(5, 4), textcoords="offset points")
        axis.plot([], [], " ", label=f"{number}  {way}")
    axis.set_xscale("log")
    axis.set_xlabel("megabytes of all messages, both ways (log)")
    axis.set_ylabel("test accuracy, mean and deviation over seeds")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, handlelength=1.2)
    figure.tight_layout()
    figure.savefig(RESULTS / "compression.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
