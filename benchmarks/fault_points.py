"""End a run at every single fault point, resume it, compare all that it leaves behind byte for byte.

    python benchmarks/fault_points.py [--every 1]

Three clients, two of them a round, three rounds, kept optimizer moments, a baseline: small, and every kind of durable
write is in it. Each trial forks a process that ends by itself (`os._exit`, no clean-up) when it reaches point n, then
resumes the run in another. A point: the opening, both halves, the fsync and the rename of each write, each order and
reply, each counted reply, sum, server step and commit. Then the same with a disk that refuses from point n on.
Writes benchmarks/results/fault_points.md.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import weft
from weft.core.errors import RunError
from weft.core.points import listening
from weft.journal import read
from weft.testing.faults import DISK, dying_at, refusing_at

ROOT = Path(__file__).parent.parent
WORDS = ("asthma", "gout", "measles", "anemia", "rabies", "malaria")


def records(path: Path, count: int, offset: int) -> str:
    rows = [(WORDS[(i + offset) % 6], f"site-{i % 3}", 1 + i % 3) for i in range(count)]
    lines = [{"question": f"What is {w}?", "answer": f"{w} is a disease. " * n, "site": s} for w, s, n in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return str(path)


def job(folder: Path) -> weft.Job:
    data: dict[str, Any] = {"split": {"by": "site"}}
    data |= {"train": records(folder / "train.jsonl", 12, 0), "test": records(folder / "test.jsonl", 3, 2)}
    return weft.Job(
        model={"name": str(ROOT / "examples" / "models" / "stories260K")},
        adapter={"lora": {"rank": 2, "alpha": 6, "targets": ["q_proj"]}},
        task={"causal_lm": {"max_length": 32}},
        data=data,
        clients={"per_round": 2},
        local={"lr": 0.01, "batch": 4, "moments": "keep"},
        rounds=3,
        evaluate={"on": ["loss"]},
        baselines=["local"],
        seed=3,
    )


def left_behind(folder: Path) -> str:
    """Return a hash over adapter, checkpoints, client memories and what the journals and results say but for time."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:  # a checkpoint carries its round's seconds; its tensors are the state's
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    for path in sorted(folder.rglob("journal.jsonl")):
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for row in read(path)]
        for row in rows:
            for client in row.get("clients", {}).values():
                client.pop("seconds", None)
        digest.update(json.dumps(rows, sort_keys=True).encode())
    digest.update(json.dumps(weft.Run(folder).results["methods"], sort_keys=True).encode())
    return digest.hexdigest()


def forked(number: int, plan: weft.Job, folder: Path) -> int:
    """Run in a child process that ends without clean-up at point `number`; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    passed = 0

    def listen(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            os._exit(99)

    try:
        with listening(listen):
            weft.run(plan, folder, resume=(folder / "run.json").is_file())
    except BaseException as error:
        print(f"point {number}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def refused(number: int, plan: weft.Job, folder: Path) -> bool:
    """Run on a disk that refuses from its point `number` on; tell whether one sentence came of it."""
    try:
        with refusing_at(number):
            weft.run(plan, folder)
    except RunError as error:
        return "make room or mend the disk" in str(error)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    every = parser.parse_args().every
    lines = []
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        plan = job(base)
        with dying_at(0) as points:
            weft.run(plan, base / "whole")
        expected = left_behind(base / "whole")
        disk = [name for name in points if name.partition(":")[0] in DISK]
        died = [n for n in range(1, len(points) + 1, every) if not _survives(n, plan, base / f"d{n}", expected)]
        sore = [n for n in range(1, len(disk) + 1, every) if not _mends(n, plan, base / f"r{n}", expected)]
    kinds = Counter(name.partition(":")[0] for name in points)
    lines = [
        "# Death at every fault point",
        "",
        f"Three clients, three rounds, a baseline: **{len(points)} fault points** "
        f"({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}).",
        "",
        "| fault | points tried | resumed to the same bytes | failed at |",
        "|---|---|---|---|",
        _row("the process ends (`os._exit`)", len(points), every, [points[n - 1] for n in died]),
        _row("the disk is full from here on", len(disk), every, [disk[n - 1] for n in sore]),
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores. Command: `python benchmarks/fault_points.py`.",
    ]
    (ROOT / "benchmarks" / "results" / "fault_points.md").write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\n".join(lines))
    raise SystemExit(1 if died or sore else 0)


def _row(what: str, count: int, every: int, failed: list[str]) -> str:
    tried = len(range(1, count + 1, every))
    return f"| {what} | {tried} | {tried - len(failed)} | {', '.join(failed) or '-'} |"


def _survives(number: int, plan: weft.Job, folder: Path, expected: str) -> bool:
    ended = forked(number, plan, folder) == 99
    again = forked(0, plan, folder) == 0
    print(f"point {number}: {'ended' if ended else 'NOT REACHED'}", flush=True)
    return ended and again and left_behind(folder) == expected


def _mends(number: int, plan: weft.Job, folder: Path, expected: str) -> bool:
    said = refused(number, plan, folder)
    return said and forked(0, plan, folder) == 0 and left_behind(folder) == expected


if __name__ == "__main__":
    main()
