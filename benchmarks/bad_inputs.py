"""Print every mistake that the tests make, with the sentence that Weft answered and the exit code.

    python benchmarks/bad_inputs.py

Runs the tests that record what was said (`record_property`). Each asserts the right words, one line, no traceback, and
nothing written or lost; a row is here only if its test passed. Writes benchmarks/results/bad_inputs.md.
"""

import os
import platform
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TESTS = {
    "command line, jobs, data, models, run folders": "tests/test_bad_inputs.py",
    "lines of a data file": "tests/data/test_records.py",
    "adapter folders": "tests/adapters/test_gate.py",
    "letters between sites": "tests/links/test_letters.py",
    "sites that differ": "tests/deploy/test_agree.py",
    "a site's policy": "tests/deploy/test_policy.py",
}
CODES = {"adapter folders": 2, "letters between sites": 1, "sites that differ": 3, "a site's policy": 3}
"""Where a test looks at the error itself: the exit code of that kind of error."""


class Said:
    """Collects what the tests record, by file."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, dict[str, Any]]] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call" and report.passed and report.user_properties:
            file, _, name = report.nodeid.partition("::")
            case = re.sub(r"^\w+\[(.*)\]$", r"\1", name)
            self.rows.append((file, case, dict(report.user_properties)))


def clean(text: object) -> str:
    """Return one cell of a table: no path of this machine, no column mark."""
    said = re.sub(r"(/tmp|/private)\S*/", "DIR/", str(text).strip().removeprefix("error: "))
    return said.replace(str(ROOT), "WEFT").replace("|", "\\|")[:300]


def main() -> None:
    said = Said()
    os.chdir(ROOT)
    pytest.main(["-q", "--no-header", "-o", "addopts=", "-p", "no:cacheprovider", *TESTS.values()], plugins=[said])
    files = {file: kind for kind, file in TESTS.items()}
    counts = Counter(files[file] for file, _, _ in said.rows)
    text = f"# What Weft says of {len(said.rows)} mistakes\n\n"
    text += "Each sentence is the whole of standard error; nothing was written or lost. "
    text += f"Machine: {platform.machine()}, Python {platform.python_version()}. "
    text += "Command: `python benchmarks/bad_inputs.py`.\n"
    for kind, file in TESTS.items():
        text += (
            f"\n## {kind[0].upper()}{kind[1:]} ({counts[kind]})\n\n| mistake | what Weft says | exit |\n|---|---|---|\n"
        )
        for case, held in ((case, held) for of, case, held in said.rows if of == file):
            text += f"| {clean(case)} | {clean(held['said'])} | {held.get('code', CODES.get(kind, 2))} |\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bad_inputs.md").write_text(text, encoding="utf8")
    print(f"{len(said.rows)} mistakes; failed tests: {said.failed or 'none'}")
    sys.exit(1 if said.failed or min(counts[kind] for kind in TESTS) == 0 else 0)


if __name__ == "__main__":
    main()
