"""Run 200 rounds in one process; memory must stay where it was after the first twenty, open files constant.

    python benchmarks/soak.py [--rounds 200]

The small job of benchmarks/fault_points.py, with clients that remember, evaluation in every round and a report at the
end. Resident memory is read after each round. Writes benchmarks/results/soak.md.
"""

import argparse
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from fault_points import job

import weft
from weft.watch import Watch

RESULT = Path(__file__).parent / "results" / "soak.md"
WARM = 20  # rounds until caches and arenas are filled


class Meter(Watch):
    """Reads memory, open files and child processes after each round."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.rows: list[tuple[float, int, int]] = []

    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        info = self.process
        self.rows.append((info.memory_info().rss / 2**20, info.num_fds(), len(info.children(recursive=True))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    meter = Meter()
    with tempfile.TemporaryDirectory() as place:
        plan = job(Path(place)).model_copy(update={"rounds": rounds, "baselines": ()})
        weft.run(plan, Path(place) / "run", watch=meter)
    early, late = meter.rows[WARM : WARM + 20], meter.rows[-20:]
    before, after = (statistics.median(row[0] for row in rows) for rows in (early, late))
    growth = after / before - 1
    files = sorted({row[1] for row in meter.rows[WARM:]})
    lines = [
        f"# {rounds} rounds in one process",
        "",
        "| what | after the first rounds | at the end | bar |",
        "|---|---|---|---|",
        f"| resident memory, median of 20 rounds | {before:.1f} MiB | {after:.1f} MiB ({growth:+.1%}) | + 5 % |",
        f"| open files | {files[0]} | {files[-1]} | constant |",
        f"| child processes | {meter.rows[WARM][2]} | {meter.rows[-1][2]} | 0 |",
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores. Command: `python benchmarks/soak.py`.",
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\n".join(lines))
    raise SystemExit(0 if growth < 0.05 and len(files) == 1 and not meter.rows[-1][2] else 1)


if __name__ == "__main__":
    main()
