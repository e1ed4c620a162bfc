"""A run that dies anywhere and is resumed ends in the same bytes, with every round once in the journal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import weft
from tests.test_runs import adapter_hash
from weft import Job, Run
from weft.core.errors import PolicyError, RunError
from weft.journal import read as read_journal
from weft.testing.faults import DISK, Died, dying_at, refusing_at


@pytest.fixture
def kept(values: dict[str, Any]) -> dict[str, Any]:
    """Return a job whose clients keep their moments, so that memories on disk matter; two of three a round."""
    values["local"]["moments"] = "keep"
    values["clients"] = {"per_round": 2}
    values["baselines"] = ["local"]
    values["rounds"] = 2
    return values


ROUNDS = [0, 1, 2]


def journals_whole(folder: Path) -> bool:
    paths = (folder / "journal.jsonl", folder / "baselines" / "local" / "journal.jsonl")
    return all([row["round"] for row in read_journal(path)] == ROUNDS for path in paths)


@pytest.fixture
def world(kept: dict[str, Any], tmp_path: Path) -> tuple[Job, str, list[str]]:
    """Return a job, the bytes that it ends in, and the names of all its fault points."""
    with dying_at(0) as points:
        expected = adapter_hash(weft.run(Job(**kept), tmp_path / "whole"))
    return Job(**kept), expected, points


def test_death_at_fault_points(world: tuple[Job, str, list[str]], tmp_path: Path) -> None:
    """Every 23rd point; benchmarks/fault_points.py takes each, in processes that truly end."""
    job, expected, points = world
    assert {name.partition(":")[0] for name in points} >= {*DISK, "reply", "counted", "summed", "stepped", "committed"}
    for number in range(1, len(points) + 1, 23):
        folder = tmp_path / f"at-{number}"
        with pytest.raises(Died), dying_at(number):
            weft.run(job, folder)
        run = weft.run(job, folder, resume=(folder / "run.json").is_file())
        assert adapter_hash(run) == expected, points[number - 1]
        assert journals_whole(folder), points[number - 1]


def test_a_disk_that_refuses(world: tuple[Job, str, list[str]], tmp_path: Path) -> None:
    """One sentence with the path, and the run can be resumed; every 29th write, fsync and rename."""
    job, expected, points = world
    chances = [name for name in points if name.partition(":")[0] in DISK]
    for number in range(1, len(chances) + 1, 29):
        folder = tmp_path / f"at-{number}"
        with pytest.raises(RunError, match=r"cannot write .*bytes\): No space left .*; make room"), refusing_at(number):
            weft.run(job, folder)
        assert not list(folder.rglob("*.tmp")), chances[number - 1]
        run = weft.run(job, folder, resume=(folder / "run.json").is_file())
        assert adapter_hash(run) == expected, chances[number - 1]
        assert journals_whole(folder), chances[number - 1]


def test_a_memory_that_is_ignored_would_show(kept: dict[str, Any], tmp_path: Path) -> None:
    """Negative control: without the clients' memories the same job ends in other bytes."""
    expected = adapter_hash(weft.run(Job(**kept), tmp_path / "kept"))
    kept["local"]["moments"] = "reset"
    assert adapter_hash(weft.run(Job(**kept), tmp_path / "reset")) != expected


def test_a_real_kill_and_resume(values: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL to a real process in the middle of its rounds; benchmarks/kill_and_resume.py does it at 20 moments."""
    values["rounds"], values["baselines"] = 30, []
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "folder"}))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "weft.cli", "run", str(tmp_path / "job.yaml"), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(read_journal(out / "journal.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(read_journal(out / "journal.jsonl"))
    assert 5 <= before < 31
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert [row["round"] for row in Run(out).history] == list(range(31))
    assert adapter_hash(Run(out)) == adapter_hash(weft.run(tmp_path / "job.yaml", tmp_path / "whole"))


def test_resume_keeps_the_way_the_run_began(job: Job, tmp_path: Path) -> None:
    run = weft.run(job, tmp_path / "run", exact=True, threads=2)  # exact means one, whatever is asked
    again = weft.run(job, tmp_path / "run", resume=True)
    assert adapter_hash(again) == adapter_hash(run)
    assert again.results["environment"]["exact"] is True
    assert again.results["environment"]["threads"] == 1


def test_threads_are_a_setting(job: Job, tmp_path: Path) -> None:
    """A tiny base gets one thread by itself; the process keeps its own number afterwards."""
    import torch

    before = torch.get_num_threads()
    run = weft.run(job, tmp_path / "two", threads=2)
    assert run.results["environment"]["threads"] == 2
    assert weft.run(job, tmp_path / "two", resume=True).results["environment"]["threads"] == 2
    assert weft.run(job, tmp_path / "one").results["environment"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_another_base_is_refused_on_resume(values: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "model"
    shutil.copytree(values["model"]["name"], copy)
    values["model"]["name"] = "model"
    weft.run(Job(**values), tmp_path / "run")
    weights = load_file(copy / "model.safetensors")
    name = next(iter(sorted(weights)))
    weights[name] = weights[name] + torch.tensor(1e-3)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="the base model or its vocabulary changed"):
        weft.run(Job(**values), tmp_path / "run", resume=True)
