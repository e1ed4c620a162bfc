"""Register 1,000 to 100,000 clients, ask 50 of them a round; seconds and memory should not care.

    python benchmarks/scale.py [--records 100000] [--rounds 5]

The same records, divided among ever more clients: with 100,000 each has one. The model is stories260K, so training is
nearly free and what is left is bookkeeping: sampling, orders, sums, checkpoint, journal. Then the smallest and the
largest number of clients with a load that is one: a LLaMA shape of 25 M parameters, LoRA r=8, 32 steps of one record.
Each run is a process of its own; bookkeeping is a round's processor time less that of the site's own work, evaluation
left out. Clients remember (moments: keep). Writes benchmarks/results/scale.{md,csv,png}.
"""

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZES = (1_000, 10_000, 100_000)
FIELDS = (
    "model", "clients", "round_seconds", "bookkeeping_seconds", "part", "start_seconds", "peak_mb", "checkpoint_kb",
    "report_kb", "results_kb", "split_kb",
)  # fmt: skip
ROUNDS_LOADED, STEPS_LOADED = 1, 32


def model_of(loaded: bool, folder: Path) -> dict[str, Any]:
    """Return the base of a run: a shape of 25 M parameters with random weights, or stories260K."""
    if not loaded:
        return {"name": str(ROOT / "examples" / "models" / "stories260K")}
    from workers import shape

    if not (folder / "model").exists():
        shape(folder / "model")
    return {"name": str(folder / "model"), "random": True}


def measured(clients: int, rounds: int, folder: Path, loaded: bool) -> dict[str, Any]:
    """Run one size here and return its row."""
    import weft
    from weft.core.types import Order, Reply
    from weft.site.site import Site
    from weft.watch import Watch

    inside, ends = [0.0], []

    class Meter(Watch):
        def begin(self, method: str, done: int, of: int, cohort: int) -> None:
            ends.append(time.process_time())

        def round(self, method: str, number: int, row: dict[str, Any]) -> None:
            ends.append(time.process_time())

    handle = Site.handle

    def timed(self: Site, order: Order) -> Iterator[Reply]:
        replies = handle(self, order)
        while True:
            began = time.process_time()
            try:
                reply = next(replies)
            except StopIteration:
                return
            finally:
                inside[0] += time.process_time() - began
            yield reply

    Site.handle = timed  # type: ignore[method-assign]
    began = time.process_time()
    weft.run(
        weft.Job(
            model=model_of(loaded, folder),
            adapter={"lora": {"rank": 8 if loaded else 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}},
            task={"causal_lm": {"max_length": 32}},
            data={
                "train": str(folder / "train.jsonl"),
                "test": str(folder / "test.jsonl"),
                "split": {"iid": {"clients": clients}},
            },
            clients={"per_round": 50},
            local={"lr": 1e-3, "batch": 1 if loaded else 4, "steps": STEPS_LOADED if loaded else 2, "moments": "keep"},
            rounds=rounds,
            evaluate={"every": 0, "on": ["loss"]},
            baselines=[],
        ),
        folder / f"run-{clients}-{loaded}",
        watch=Meter(),
    )
    out = folder / f"run-{clients}-{loaded}"
    spent = (ends[-1] - ends[0]) / rounds
    outside = spent - inside[0] / rounds
    checkpoint = max((out / "checkpoints").glob("*.safetensors")).stat().st_size
    sizes = {path.stem: path.stat().st_size / 1024 for path in out.glob("*.*") if path.is_file()}
    return {
        "model": "25 M" if loaded else "stories260K",
        "clients": clients,
        "round_seconds": spent,
        "bookkeeping_seconds": outside,
        "part": outside / spent,
        "start_seconds": ends[0] - began,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "checkpoint_kb": checkpoint / 1024,
        **{f"{name}_kb": sizes[name] for name in ("report", "results", "split")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        clients, loaded, place = options.one
        print(json.dumps(measured(int(clients), options.rounds, Path(place), loaded == "loaded")))
        return
    sizes = [size for size in SIZES if size <= options.records]
    with tempfile.TemporaryDirectory() as place:
        for name, count in (("train", options.records), ("test", 20)):
            lines = ({"question": f"What is {i}?", "answer": f"It is {i % 97}."} for i in range(count))
            (Path(place) / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows: list[dict[str, Any]] = []
        for size, load in [*((size, "light") for size in sizes), (sizes[0], "loaded"), (sizes[-1], "loaded")]:
            rows.append(one(size, load, place, options.rounds if load == "light" else ROUNDS_LOADED))
            write(rows, options.records, options.rounds)  # after each: a long run that is stopped has its rows


def one(size: int, load: str, place: str, rounds: int) -> dict[str, Any]:
    """Run one size in a process of its own, and remove what it wrote."""
    command = [sys.executable, __file__, "--one", str(size), load, place, "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    for run in Path(place).glob("run-*"):
        shutil.rmtree(run)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def write(rows: list[dict[str, Any]], records: int, rounds: int) -> None:
    with open(RESULTS / "scale.csv", "w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows)
    lines = [
        "# Registered clients",
        "",
        f"{records:,} records divided among the clients, 50 of them asked in a round, memories kept. stories260K: two "
        "steps each, so that little but bookkeeping is left; 25 M: LoRA r=8 on q and v, 32 steps each of one record. "
        "Bookkeeping is all of a round but the site's own work; the start is reading, splitting, encoding and "
        "describing all records. `split.json` says where each record is.",
        "",
        "| model | clients | CPU s a round | of these bookkeeping | part | CPU s to start | peak memory | checkpoint | "
        "report | split.json |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['clients']:,} | {row['round_seconds']:.2f} | {row['bookkeeping_seconds']:.3f} | "
            f"{row['part']:.2%} | {row['start_seconds']:.1f} | {row['peak_mb']:.0f} MiB | "
            f"{row['checkpoint_kb']:.0f} KiB | {row['report_kb']:.0f} KiB | {row['split_kb']:.0f} KiB |"
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread; processor time, as others were at work"
    command = f"python benchmarks/scale.py --rounds {rounds}"
    lines += ["", f"Machine: {machine}. Command: `{command}`.", "", "![Scale](scale.png)"]
    (RESULTS / "scale.md").write_text("\n".join(lines) + "\n", encoding="utf8")
    plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    rows = [row for row in rows if row["model"] == "stories260K"]
    clients = [row["clients"] for row in rows]
    left.plot(clients, [row["round_seconds"] for row in rows], "o-", label="a round")
    left.plot(clients, [row["bookkeeping_seconds"] for row in rows], "s-", label="of it bookkeeping")
    right.plot(clients, [row["peak_mb"] for row in rows], "o-", label="peak memory")
    for axis, unit in ((left, "CPU seconds"), (right, "MiB")):
        axis.set(xscale="log", xlabel="registered clients", ylabel=unit, ylim=(0, None))
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "scale.png", dpi=120)


if __name__ == "__main__":
    main()
