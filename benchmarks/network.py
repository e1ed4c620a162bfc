"""Play a small federation over a thousand bad networks; the last state must be that of a good one, byte for byte.

    python -m benchmarks.network [--seeds 1000]

Five clients, three of them a round, three rounds, SCAFFOLD (clients that remember) and FedAvgM. Replies are lost, late,
doubled, corrupted and re-ordered. A seed that fails is printed and can be played again with --first. Writes
benchmarks/results/network.md.
"""

import argparse
import hashlib
import os
import platform
from collections import Counter
from pathlib import Path

from tests.testing.test_network import played
from weft.algorithms.fedavgm import fedavgm
from weft.algorithms.scaffold import scaffold

RESULT = Path(__file__).parent / "results" / "network.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    lines = [
        "# A thousand bad networks",
        "",
        "| rule | networks | identical last state | weights as on a good network | faults met | state |",
        "|---|---|---|---|---|---|",
    ]
    bad = 0
    for name, algorithm in (("fedavgm", fedavgm()), ("scaffold", scaffold())):
        expected, clean, _ = played(algorithm, None)
        weights = [{n: c["weight"] for n, c in row["clients"].items()} for row in clean]
        same = counted = 0
        met: Counter[str] = Counter()
        for seed in range(options.first, options.first + options.seeds):
            state, records, faults = played(algorithm, seed)
            met += faults
            same += state == expected
            counted += [{n: c["weight"] for n, c in row["clients"].items()} for row in records] == weights
            if state != expected:
                print(f"{name}: network seed {seed} ends in another state", flush=True)
        bad += 2 * options.seeds - same - counted
        faults_met = ", ".join(f"{count:,} {fault}" for fault, count in sorted(met.items()))
        digest = hashlib.sha256(expected).hexdigest()[:12]
        lines.append(f"| {name} | {options.seeds:,} | {same:,} | {counted:,} | {faults_met} | {digest} |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    lines += ["", f"Machine: {machine}. Command: `python -m benchmarks.network`."]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\n".join(lines))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
