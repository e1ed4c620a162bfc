"""Run the example suites and keep their tables under benchmarks/results/suites/; SST-2 by its path, if it is at hand.

    python benchmarks/suites.py [--only medquad] [--runs runs/suites]
    python benchmarks/suites.py --sst2 FOLDER    the ranks suite over FOLDER/train.jsonl and test.jsonl (text, label)

A suite that was stopped goes on where it was.
"""

import argparse
import shutil
from pathlib import Path

from weft.suite.run import bench

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "suites"
KEPT = ("leaderboard.csv", "leaderboard.md", "leaderboard.json")


def keep(folder: Path, name: str) -> None:
    """Copy the tables of a finished suite."""
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for table in KEPT:
        shutil.copy(folder / table, RESULTS / name / table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("medquad", "ranks", "adapters"))
    parser.add_argument("--runs", type=Path, default=Path("runs/suites"))
    parser.add_argument("--sst2", type=Path)
    given = parser.parse_args()
    if given.sst2:
        sets = [f"data.{name}={(given.sst2 / name).resolve()}.jsonl" for name in ("train", "test")]
        bench(ROOT / "examples/suites/ranks.yaml", given.runs / "sst2", overrides=sets, threads=1)
        keep(given.runs / "sst2", "sst2")
        return
    for name in [given.only] if given.only else ["medquad", "ranks", "adapters"]:
        bench(ROOT / "examples/suites" / f"{name}.yaml", given.runs / name, threads=1)
        keep(given.runs / name, name)


if __name__ == "__main__":
    main()
