"""Register 1,000 to 100,000 clients, ask 50 of them a round; seconds and memory should not care.

    python -m benchmarks.scale [--records 100000] [--rounds 5]

The same records, divided among ever more clients: with 100,000 each has one. The model is stories260K, so training is
nearly free and what is left is bookkeeping: sampling, orders, sums, checkpoint, journal. Each size runs in a process of
its own; bookkeeping is a round's processor time less that of the site's own work, evaluation left out. Clients
remember (moments: keep). Writes benchmarks/results/scale.{md,csv,png}.
"""

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
FIELDS = ("clients", "round_seconds", "bookkeeping_seconds", "part", "start_seconds", "peak_mb", "checkpoint_kb")


def measured(clients: int, rounds: int, folder: Path) -> dict[str, Any]:
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
            model={"name": str(ROOT / "examples" / "models" / "stories260K")},
            adapter={"lora": {"rank": 4, "alpha": 8}},
            task={"causal_lm": {"max_length": 32}},
            data={
                "train": str(folder / "train.jsonl"),
                "test": str(folder / "test.jsonl"),
                "split": {"iid": {"clients": clients}},
            },
            clients={"per_round": 50},
            local={"lr": 1e-3, "batch": 4, "steps": 2, "moments": "keep"},
            rounds=rounds,
            evaluate={"every": 0, "on": ["loss"]},
            baselines=[],
        ),
        folder / f"run-{clients}",
        watch=Meter(),
    )
    spent = (ends[-1] - ends[0]) / rounds
    outside = spent - inside[0] / rounds
    checkpoint = max((folder / f"run-{clients}" / "checkpoints").glob("*.safetensors")).stat().st_size
    return {
        "clients": clients,
        "round_seconds": spent,
        "bookkeeping_seconds": outside,
        "part": outside / spent,
        "start_seconds": ends[0] - began,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "checkpoint_kb": checkpoint / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(int(options.one[0]), options.rounds, Path(options.one[1]))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, count in (("train", options.records), ("test", 20)):
            lines = ({"question": f"What is {i}?", "answer": f"It is {i % 97}."} for i in range(count))
            (Path(place) / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for size in (size for size in SIZES if size <= options.records):
            command = [
                sys.executable,
                "-m",
                "benchmarks.scale",
                "--one",
                str(size),
                place,
                "--rounds",
                str(options.rounds),
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    write(rows, options.records)


def write(rows: list[dict[str, Any]], records: int) -> None:
    with open(RESULTS / "scale.csv", "w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows)
    lines = [
        "# Registered clients",
        "",
        f"{records:,} records divided among the clients, 50 of them asked in a round, two steps each, memories kept.",
        "",
        "| clients | CPU s a round | of these bookkeeping | part | CPU s to start | peak memory | checkpoint |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['clients']:,} | {row['round_seconds']:.2f} | "
            f"{row['bookkeeping_seconds']:.3f} | "
            f"{row['part']:.1%} | {row['start_seconds']:.1f} | "
            f"{row['peak_mb']:.0f} MiB | {row['checkpoint_kb']:.0f} KiB |"
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    lines += ["", f"Machine: {machine}. Command: `python -m benchmarks.scale`.", "", "![Scale](scale.png)"]
    (RESULTS / "scale.md").write_text("\n".join(lines) + "\n", encoding="utf8")
    plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
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
