"""Feed the parsers inputs that atheris grows by what code they reach; only Weft's own one-sentence errors may come out.

    pip install atheris
    python -m benchmarks.fuzz_guided [--count 20000] [--only wire]

Each parser runs in a process of its own, since atheris never returns. An input that brings another exception is kept
beside the results as fuzz-<parser>.bin. Writes benchmarks/results/fuzz_guided.md.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PARSERS = ("records", "job", "adapter config", "wire", "letter with an order", "letter with a reply", "checkpoint")


def grow(name: str, count: int) -> None:
    """Let atheris run one parser; it ends the process, with another code where an exception came out."""
    import atheris

    with atheris.instrument_imports(include=["weft"]):
        from tests.fuzzing import targets, tried

    place = Path(tempfile.mkdtemp())
    target = targets(place)[name]
    seeds = place / "seeds"
    seeds.mkdir()
    (seeds / "sound").write_bytes(target.sound)

    def once(content: bytes) -> None:
        outcome = tried(target, content, place)
        if outcome not in ("taken", "refused"):
            (RESULTS / f"fuzz-{name.replace(' ', '-')}.bin").write_bytes(content)
            raise AssertionError(outcome)

    flags = [f"-runs={count}", "-seed=1", "-max_len=4096", "-rss_limit_mb=4096", f"-artifact_prefix={place}/"]
    atheris.Setup([sys.argv[0], *flags, str(seeds)], once)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--only", nargs="+", choices=PARSERS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return grow(options.inside, options.count)
    rows, bad = [], 0
    for name in options.only or PARSERS:
        command = [sys.executable, "-m", "benchmarks.fuzz_guided", "--inside", name, "--count", str(options.count)]
        done = subprocess.run(command, capture_output=True, text=True)
        reached = re.findall(r"cov: (\d+)", done.stderr)
        first, last = (reached[0], reached[-1]) if reached else ("-", "-")
        bad += done.returncode != 0
        rows.append(f"| {name} | {options.count:,} | {first} | {last} | {'none' if not done.returncode else 'YES'} |")
        print(rows[-1], *done.stderr.splitlines()[-12:] if done.returncode else (), sep="\n", flush=True)
    head = "| parser | inputs | code reached at first | at the end | anything else |\n|---|---|---|---|---|"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    note = "Code reached: edges of Weft's own code that atheris counts."
    page = ["# Inputs grown by what they reach", "", note, "", head, *rows, ""]
    page.append(f"Machine: {machine}. Command: `python -m benchmarks.fuzz_guided`.")
    if not options.only:
        (RESULTS / "fuzz_guided.md").write_text("\n".join(page) + "\n", encoding="utf8")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
