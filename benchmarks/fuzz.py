"""Feed every parser mutated inputs; whatever comes, only Weft's own one-sentence errors may come out.

    python -m benchmarks.fuzz [--count 100000] [--seed 0] [--only wire]

Writes benchmarks/results/fuzz.md, one row a parser; an input that brings another exception is kept beside it as
fuzz-<parser>-<number>.bin and printed.
"""

import argparse
import os
import platform
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.fuzzing import mutated, targets, tried

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    rows, bad = [], 0
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=fast) as place:
        for name, target in targets(Path(place)).items():
            if options.only and name not in options.only:
                continue
            draw, began = Random(f"{options.seed} {name}"), time.process_time()
            seen: Counter[str] = Counter()
            for number in range(options.count):
                content = mutated(target.sound, draw)
                outcome = tried(target, content, Path(place))
                seen[outcome if outcome in ("taken", "refused") else "other"] += 1
                if outcome not in ("taken", "refused"):
                    print(f"{name} {number}: {outcome}", flush=True)
                    (RESULTS / f"fuzz-{name}-{number}.bin").write_bytes(content)
            bad += seen["other"]
            seconds = time.process_time() - began
            counts = f"{options.count:,} | {seen['taken']:,} | {seen['refused']:,} | {seen['other']:,}"
            rows.append(f"| {name} | {counts} | {seconds:.0f} |")
            print(rows[-1], flush=True)
    head = (
        "| parser | inputs | taken | refused in one sentence | anything else | CPU seconds |\n|---|---|---|---|---|---|"
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = "\n".join(
        ["# Mutated inputs", "", head, *rows, "", f"Machine: {machine}. Command: `python -m benchmarks.fuzz`."]
    )
    if not options.only:
        (RESULTS / "fuzz.md").write_text(text + "\n", encoding="utf8")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
