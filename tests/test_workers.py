"""A process for each device: the same bytes as one process, whatever happens to the workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import weft
from tests.test_runs import adapter_hash
from weft import Job, Run
from weft.core.errors import JobError
from weft.links.workers import devices_of, visible
from weft.peak import peak_mb
from weft.signals import Stopped, stoppable
from weft.watch import Watch


def results(run: Run) -> dict[str, Any]:
    """Return what a run measured, and what it wrote for each client and each round, without times and machines."""
    rows = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None), row.pop("peak_memory_mb", None)
        for client in row.get("clients", {}).values():
            client.pop("seconds")
    kept = {path.name + path.parent.name: path.read_bytes() for path in run.folder.rglob("clients/*/*.safetensors")}
    scores = {path.name: path.read_bytes() for path in run.folder.rglob("scores/*.json")}
    measured = {key: run.results[key] for key in ("methods", "bytes", "adapter", "job", "rounds")}
    return {"measured": measured, "journal": rows, "adapter": adapter_hash(run), "kept": kept, "scores": scores}


def workers() -> list[psutil.Process]:
    """Return the worker processes of this one."""
    return [child for child in psutil.Process().children() if "weft.worker" in child.cmdline()]


class Notes(Watch):
    """Does something after a round, and remembers what is said."""

    def __init__(self, **after: Any) -> None:
        self.after, self.said, self.seen = after, list[str](), 0

    def notice(self, text: str) -> None:
        self.said.append(text)

    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        self.seen = max(self.seen, len(workers()))
        if method == "federated" and (act := self.after.get(f"r{number}")):
            act()


def test_two_workers_give_the_bytes_of_one_process(values: dict[str, Any], tmp_path: Path) -> None:
    """Fedavg and both kinds of baseline, three blocks, an evaluation each round divided by test group."""
    values |= {"rounds": 2, "baselines": ["untrained", "local", "centralized"]}
    alone = weft.run(Job(**values), tmp_path / "alone", block=1)
    notes = Notes()
    many = weft.run(Job(**values), tmp_path / "many", block=1, devices="cpu*2", watch=notes)
    assert results(many) == results(alone)
    assert notes.seen == 2
    assert workers() == []
    assert many.history[2]["peak_memory_mb"] > 1.5 * alone.history[2]["peak_memory_mb"]


def test_killed_stopped_and_resumed_alone(values: dict[str, Any], tmp_path: Path) -> None:
    """Scaffold keeps control variates: a worker is killed after round 1, Ctrl-C comes in round 2, no worker goes on."""
    values |= {"rounds": 3, "algorithm": "scaffold", "baselines": []}
    values["local"] |= {"optimizer": "sgd", "schedule": "constant"}
    alone = weft.run(Job(**values), tmp_path / "alone", block=1)
    notes = Notes(r1=lambda: workers()[0].kill(), r2=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped), stoppable():
        weft.run(Job(**values), tmp_path / "many", block=1, devices="cpu,cpu", watch=notes)
    assert workers() == []
    assert [text for text in notes.said if "worker" in text] == [
        "worker 1 (cpu) was killed (signal 9: by hand, or by a system that runs out of memory); "
        + ("the others go on" if "the others" in notes.said[-1] else "its work is given to another")
    ]
    done = weft.run(Job(**values), tmp_path / "many", resume=True)
    assert results(done) == results(alone)
    one = next((tmp_path / "alone").rglob("clients/*/*.safetensors"))
    one.write_bytes(one.read_bytes()[:-1] + b"x")
    assert results(done) != results(alone)  # a single byte of one client's memory is seen


def test_what_is_wrong_in_a_worker_is_said_as_here(values: dict[str, Any], tmp_path: Path) -> None:
    """More positions than the model has: only who loads the model can know, and the line is the job file's."""
    values["task"] = {"causal_lm": {"max_length": 4096}}
    said = []
    for settings in ({}, {"devices": "cpu"}):
        with pytest.raises(JobError) as caught:
            weft.run(Job(**values), tmp_path / "run", **settings)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]
    assert workers() == []


def test_simulated_secure_aggregation_stays_in_one_process(values: dict[str, Any], tmp_path: Path) -> None:
    values["pipeline"] = ["delta", {"clip": {"norm": 1.0}}, {"weigh": {"by": "examples", "cap": 8}}, "ring", "mask"]
    with pytest.raises(JobError, match=r"^--devices: the keys of simulated secure aggregation live in one process"):
        weft.run(Job(**values), tmp_path / "run", devices="cpu*2")


ORPHANED = """
import time
from weft.links.workers import Spawned
spawned = Spawned(["cpu", "cpu"], "weft.worker")
print(*(process.pid for process in spawned.processes), flush=True)
time.sleep(600)
"""


def test_workers_do_not_outlive_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout as said:
        children = [psutil.Process(int(pid)) for pid in said.readline().split()]
    time.sleep(0.3)
    assert len(children) == 2
    assert all(child.is_running() for child in children)
    parent.kill()
    parent.wait()
    _, left = psutil.wait_procs(children, timeout=10)
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("text", ["tpu", "cpu*0", "cpu,,cpu", "cuda", "cuda:2", "2"])
def test_a_device_that_is_not_there(text: str) -> None:
    with pytest.raises(JobError, match=r"^--devices "):
        devices_of(text, lambda: 2 if text == "cuda:2" else 0)


def test_devices_are_written_as_lists() -> None:
    assert devices_of("cuda:1, cpu*2,cuda:0", lambda: 2) == ("cuda:1", "cpu", "cpu", "cuda:0")
    assert devices_of("cuda*2", lambda: 2) == ("cuda:0", "cuda:1") * 2
    assert [visible(device, "GPU-7,GPU-9") for device in ("cuda:0", "cuda:1", "cpu")] == ["GPU-7", "GPU-9", ""]


def test_places_are_checked(job: Job, tmp_path: Path) -> None:
    for settings, words in (({"on": "slurm"}, "--on slurm"), ({"address": "a:1"}, "--address")):
        with pytest.raises(JobError, match=words):
            weft.run(job, tmp_path / "run", **settings)


def test_the_peak_counts_children() -> None:
    before = peak_mb()
    child = subprocess.Popen([sys.executable, "-c", "import time; held = bytearray(99 << 20); time.sleep(60)"])
    deadline = time.monotonic() + 20
    while peak_mb() < before + 99 and time.monotonic() < deadline:
        time.sleep(0.05)
    found = peak_mb()
    child.kill()
    child.wait()
    assert before + 99 < found < before + 150
