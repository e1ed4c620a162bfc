"""Ctrl-C and SIGTERM: between writes at once, in a write when it has ended, the second time in any case."""

import importlib
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
from weft import Job
from weft.core.points import listening
from weft.files import write_safely
from weft.journal import read
from weft.signals import Stopped, stoppable


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_between_writes_stops_at_once(number: int, code: int) -> None:
    with pytest.raises(Stopped) as caught, stoppable():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code


def test_a_write_in_progress_is_finished_first(tmp_path: Path) -> None:
    """The signal comes between the two halves of the content; afterwards the file is whole."""
    sent: list[str] = []

    def strike(name: str) -> None:
        if name == "write:a":
            sent.append(name)
            os.kill(os.getpid(), signal.SIGTERM) if len(sent) == 2 else None

    with pytest.raises(Stopped), stoppable(), listening(strike):
        write_safely(tmp_path / "a", b"first second")
    assert (tmp_path / "a").read_bytes() == b"first second"
    assert len(sent) == 2


def test_a_signal_in_an_import_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries catch whatever is raised while they load: a run would go on as if nobody had asked it to stop."""
    (tmp_path / "catches_all.py").write_text("""
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    whole = True
except BaseException:
    whole = False
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = []

    def load_and_wait() -> None:
        loaded.append(importlib.import_module("catches_all"))
        time.sleep(10)
        loaded.clear()

    with pytest.raises(Stopped) as caught, stoppable():
        load_and_wait()
    assert caught.value.exit_code == 143
    assert [module.whole for module in loaded] == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM])
def test_the_handlers_of_the_process_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process() -> None:
    """The first is held by a write that never ends; the second must not wait for it."""
    script = """
import os, signal
from weft.signals import held, stoppable
with stoppable(), held():
    os.kill(os.getpid(), signal.SIGINT)
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "held\n"
    assert done.returncode == -signal.SIGINT


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(number: int, code: int, values: dict[str, Any], tmp_path: Path) -> None:
    values["rounds"], values["baselines"] = 12, []
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "folder"}))
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "weft.cli", "run", str(tmp_path / "job.yaml"), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while len(read(out / "journal.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate()
    assert process.returncode == code
    assert said.strip().splitlines()[-1].startswith("error: stopped; what was finished is kept, go on with")
    assert 3 <= len(read(out / "journal.jsonl")) < 13
    run = weft.run(Job(**values), out, resume=True)
    assert [row["round"] for row in run.history] == list(range(13))
    assert adapter_hash(run) == adapter_hash(weft.run(Job(**values), tmp_path / "whole"))
