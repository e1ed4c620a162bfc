"""A suite from its file to its leaderboard: kept, stopped, failed, read again."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.suite.test_suite import write
from weft import runs
from weft.core.errors import JobError, PolicyError, RunError
from weft.store import locked
from weft.suite.run import bench
from weft.suite.suite import load_suite

TABLES = ("leaderboard.csv", "leaderboard.md", "leaderboard.json")
GRID = {"rank": {"two": {"adapter.lora.rank": 2}, "four": {"adapter.lora.rank": 4}}}


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.fixture
def four(tmp_path: Path, values: dict[str, Any]) -> Path:
    changes = {"rounds": 2, "local.steps": 1, "baselines": ["untrained", "centralized"]}
    return write(tmp_path, values, grid=GRID, seeds=[0, 1], set=changes)


@pytest.fixture
def small(tmp_path: Path, values: dict[str, Any]) -> Path:
    return write(tmp_path, values, grid=GRID, seeds=[3], set={"rounds": 2, "local.steps": 1})


def test_a_suite_gives_the_numbers_of_its_runs(four: Path, tmp_path: Path) -> None:
    """One base is read for four cells; a cell's numbers are those of the job alone; nothing is run a second time."""
    done = bench(four, tmp_path / "out", threads=1)
    assert done.loads == 1
    cell = load_suite(four).cells[-1]
    alone = weft.run(cell.job, tmp_path / "alone", threads=1).results["methods"]
    assert json.loads((tmp_path / "out/cells" / cell.folder / "results.json").read_bytes())["methods"] == alone
    before = tables(tmp_path / "out")
    again = bench(four, tmp_path / "out", threads=1)
    assert again.loads == 0
    assert tables(tmp_path / "out") == before
    with open(tmp_path / "out/leaderboard.csv", encoding="utf8", newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"two", "four", "Untrained", "Centralized, two", "Centralized, four"}
    runs_of = [
        json.loads(path.read_bytes())["methods"]["federated"]["overall"]["loss"]
        for path in sorted((tmp_path / "out/cells").glob("two-*/results.json"))
    ]
    assert float(rows["two"]["loss"]) == pytest.approx(sum(runs_of) / 2, rel=1e-5)
    assert float(rows["two"]["loss_sd"]) == pytest.approx(abs(runs_of[0] - runs_of[1]) / 2**0.5, rel=1e-3)
    assert rows["Untrained"]["trainable"] == "0"
    assert {rows["two"]["rank"], rows["four"]["rank"]} == {"1", "2"}
    _the_page_is_self_contained((tmp_path / "out/leaderboard.html").read_text(encoding="utf8"))


def _the_page_is_self_contained(text: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)|@import|url\((?!#)|https?://""", text)
    assert 'class="sortable"' in text
    assert "Paired bootstrap" in text


def test_a_base_that_an_adapter_changes_is_whole_for_the_next(tmp_path: Path, values: dict[str, Any]) -> None:
    """Pissa takes its factors out of the base: over a base that was not put back, lora would start elsewhere."""
    grid = {"init": {"pissa": {"adapter.lora.init": "pissa"}, "plain": {}, "full": {"adapter": "full"}}}
    changes = {"rounds": 1, "local.steps": 1}
    path = write(tmp_path, values, grid=grid, seeds=[0], set=changes)
    assert bench(path, tmp_path / "out", threads=1).loads == 1
    for cell in load_suite(path).cells[1:]:
        alone = weft.run(cell.job, tmp_path / cell.variant, threads=1).results
        there = json.loads((tmp_path / "out/cells" / cell.folder / "results.json").read_bytes())
        assert there["methods"] == alone["methods"]
        assert there["adapter"] == alone["adapter"]


def test_a_suite_that_was_killed_goes_on_to_the_same_tables(small: Path, tmp_path: Path) -> None:
    """SIGKILL once the first cell is done: its files stay as they are, and the tables are those of an unbroken run."""
    bench(small, tmp_path / "whole", threads=1)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "weft.cli", "bench", str(small), "--out", str(out), "--threads", "1"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/results.json")}
    assert len(finished) == 1
    bench(small, out, threads=1)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert tables(out) == tables(tmp_path / "whole")


def test_a_cell_that_fails_is_named_and_stops_no_other(tmp_path: Path, values: dict[str, Any]) -> None:
    grid = {"rule": {"ffa": {"algorithm": "ffa_lora", "adapter": "ia3"}, "avg": {}}}
    path = write(tmp_path, values, grid=grid, seeds=[0], set={"rounds": 1, "local.steps": 1})
    with pytest.raises(RunError, match=r"1 of 2 cells failed: ffa, seed 0: .*ffa_lora"):
        bench(path, tmp_path / "out", threads=1)
    text = (tmp_path / "out/leaderboard.md").read_text(encoding="utf8")
    assert "- ffa, seed 0:" in text
    assert "| 1 | avg |" in text
    assert "ffa, seed 0" in (tmp_path / "out/leaderboard.html").read_text(encoding="utf8")


def test_another_defect_is_isolated_too(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = runs.run, []

    def broken(job: Any, *given: Any, **more: Any) -> Any:
        seen.append(job)
        if len(seen) == 1:
            raise ZeroDivisionError("a defect")
        return real(job, *given, **more)

    monkeypatch.setattr(runs, "run", broken)
    with pytest.raises(RunError, match=r"1 of 2 cells failed.*ZeroDivisionError: a defect"):
        bench(small, tmp_path / "out", threads=1)
    monkeypatch.undo()
    assert bench(small, tmp_path / "out", threads=1).failures == {}
    assert len(seen) == 2


def test_records_that_changed_are_trained_on_again(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write(tmp_path, values, grid={"local.lr": [1e-3]}, set={"rounds": 1, "local.steps": 1})
    bench(path, tmp_path / "out", threads=1)
    text = (tmp_path / "test.jsonl").read_text(encoding="utf8")
    (tmp_path / "test.jsonl").write_text(text.replace("disease", "sickness"), encoding="utf8")
    before = tables(tmp_path / "out")
    bench(path, tmp_path / "out", threads=1)
    assert tables(tmp_path / "out")["leaderboard.csv"] != before["leaderboard.csv"]


def test_two_at_one_suite_are_refused(small: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(PolicyError, match="another process"):
        bench(small, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf8")
    with pytest.raises(JobError, match="not empty and not a suite"):
        bench(small, tmp_path / "out")


def test_a_metric_that_nobody_measured_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    changes = {"rounds": 1, "local.steps": 1}
    path = write(tmp_path, values, rank_by="rouge", set=changes)
    with pytest.raises(JobError, match="rank_by: no cell measured `rouge`"):
        bench(path, tmp_path / "out", threads=1)
