"""Workers as actors of a Ray cluster; what starts one is skipped where Ray is not installed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import weft
from tests.test_workers import results
from weft import Job, Run
from weft.core.errors import JobError, RunError
from weft.links import letters
from weft.links.ray import _rooms
from weft.worker import TOKEN, Worker

NODES = [
    {"NodeID": "a" * 9, "Resources": {"CPU": 8.0, "GPU": 2.0}},
    {"NodeID": "b" * 9, "Resources": {"CPU": 4.0}},
]


def test_the_same_bytes_over_ray(values: dict[str, Any], tmp_path: Path) -> None:
    """By the command line, in a process of its own; clients remember, so the run folder must be the same one."""
    pytest.importorskip("ray")
    values |= {"rounds": 2, "baselines": []}
    values["local"]["moments"] = "keep"
    alone = weft.run(Job(**values), tmp_path / "alone", block=1)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "folder"}))
    command = [sys.executable, "-m", "weft.cli", "run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "ray")]
    options = ["--on", "ray", "--devices", "cpu", "--block", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if "Ray does not start here (The current node timed out" in done.stderr:
        pytest.skip("this machine is too busy: Ray waits half a minute for its own processes")
    assert done.returncode == 0, done.stderr
    assert results(Run(tmp_path / "ray")) == results(alone)


def test_no_cluster_at_an_address(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(RunError, match=r"^--address 127.0.0.1:1: no Ray cluster answers there"):
        weft.run(job, tmp_path / "run", on="ray", address="127.0.0.1:1")


def test_ray_is_not_installed(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(JobError, match=r"^--on ray: Ray is not installed; run `pip install 'weft-fl\[ray\]'`$"):
        weft.run(job, tmp_path / "run", on="ray")
    assert not (tmp_path / "run").exists()


def test_the_room_of_actors() -> None:
    """Each of two GPUs with half the 8 cores of its machine; or 12 cores of all machines divided by three."""
    assert [(room.cores, room.gpus, room.node[:1]) for room in _rooms("", NODES)] == [(4, 1, "a"), (4, 1, "a")]
    assert [(room.cores, room.gpus, room.node) for room in _rooms("cpu*2,cuda:1", NODES)] == [(4, 0, "")] * 2 + [
        (4, 1, "")
    ]
    with pytest.raises(JobError, match="the cluster has 12 cores; ask for fewer workers"):
        _rooms("cpu*13", NODES)
    with pytest.raises(JobError, match="there is no cuda:2"):
        _rooms("cuda:2", NODES)


@pytest.mark.parametrize(("left", "known"), [("abc", True), ("abd", False), (None, False)])
def test_another_folder_at_the_same_path_is_found_out(left: str | None, known: bool, tmp_path: Path) -> None:
    if left:
        (tmp_path / TOKEN).write_text(left)
    at = {"method": "federated", "folder": str(tmp_path), "block": 1, "token": "abc"}
    answer = Worker().answer(letters.letter("question", "", at=at, kind="describe", body={}))
    said = letters.opened(answer, ("failure",), "")["reason"]
    assert ("does not see the run folder" in said) is not known
    assert os.listdir(tmp_path) == ([TOKEN] if left else [])
