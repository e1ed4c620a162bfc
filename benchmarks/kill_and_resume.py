"""SIGKILL a run at random moments, resume it, compare the adapter byte for byte with an uninterrupted run.

    python benchmarks/kill_and_resume.py [--kills 20] [--job examples/medquad.yaml]

Each trial starts a fresh process, kills it after a random part of the time that a whole run takes (model loading,
rounds, baselines, final measurements: anywhere), resumes until the run is finished, and checks that no round stands
twice in a journal. Writes benchmarks/results/kill_and_resume.md.
"""

import argparse
import hashlib
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from weft.journal import read

ROOT = Path(__file__).parent.parent
SMALL = ["rounds=6", "data.limit=90", "evaluate.on=[loss]", "baselines=[untrained, centralized]"]


def command(job: str, out: Path, resume: bool) -> list[str]:
    sets = [word for setting in SMALL for word in ("--set", setting)]
    return [sys.executable, "-m", "weft.cli", "run", job, "--out", str(out), *sets, *(["--resume"] if resume else [])]


def run(job: str, out: Path, kill_after: float | None) -> bool:
    """Start or resume a run; return whether it ended by itself."""
    resume = (out / "run.json").is_file()
    process = subprocess.Popen(command(job, out, resume), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, error = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(f"the run failed: {error.decode().strip()}")
    return True


def fingerprint(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def rounds_once(out: Path) -> bool:
    journals = [out / "journal.jsonl", *out.glob("baselines/*/journal.jsonl")]
    return all([row["round"] for row in read(path)] == list(range(7)) for path in journals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--job", default="examples/medquad.yaml")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    rows, same = [], 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        start = time.monotonic()
        run(options.job, whole, None)
        length = time.monotonic() - start
        for trial in range(options.kills):
            out, moment = Path(folder) / f"trial-{trial}", draw.uniform(0.3, 1.0) * length
            ended = run(options.job, out, moment)
            done = len(read(out / "journal.jsonl")) - 1
            while not run(options.job, out, None):
                pass
            good = fingerprint(out) == fingerprint(whole) and rounds_once(out)
            same += good
            state, verdict = "ended before" if ended else done, "same" if good else "DIFFERENT"
            rows.append(f"| {trial + 1} | {moment:.1f} | {state} | {verdict} |")
            print(rows[-1], flush=True)
    write(options, length, rows, same)


def write(options: argparse.Namespace, length: float, rows: list[str], same: int) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = (
        f"# Kill and resume\n\n{same} of {options.kills} killed and resumed runs of `{options.job}` "
        f"({', '.join(SMALL)}) ended in the byte-identical `adapter_model.safetensors` of an uninterrupted run, "
        f"each round once in every journal. Machine: {machine}; a whole run took {length:.1f} s.\n\n"
        "| trial | killed after (s) | federated rounds committed by then | adapter and journals |\n|---|---|---|---|\n"
    )
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / "kill_and_resume.md").write_text(text + "\n".join(rows) + "\n", encoding="utf8")
    print(f"{same} of {options.kills} the same")
    if same != options.kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
