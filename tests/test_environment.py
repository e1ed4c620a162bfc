"""Places and times that are not the usual ones: little memory, odd paths and locales, a full disk, clocks that jump."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import weft
from tests.conftest import write_records
from tests.test_runs import adapter_hash
from weft import Job


def run_process(values: dict[str, Any], folder: Path, before: str = "", **environment: str) -> Any:
    """Run a job by the command line in a process that first executes some Python."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        if not (folder / name).exists():
            write_records(folder / name, 6)
    (folder / "job.yaml").write_text(
        yaml.safe_dump({k: v for k, v in values.items() if k != "folder"}), encoding="utf8"
    )
    script = textwrap.dedent(before) + "\nfrom weft.cli import main\nmain()\n"
    return subprocess.run(
        [sys.executable, "-c", script, "run", str(folder / "job.yaml"), "--out", str(folder / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        encoding="utf8",
        errors="replace",
    )


@pytest.fixture
def quick(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"rounds": 1, "baselines": [], "evaluate": {"every": 0, "on": ["loss"]}}


def test_odd_paths_a_plain_locale_no_home_and_no_network(quick: dict[str, Any], tmp_path: Path) -> None:
    """A folder with spaces, quotes and other scripts; LC_ALL=C; a home that cannot be written; no socket at all."""
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    no_network = """
        import socket
        def refused(*a, **k): raise OSError("the network was asked")
        socket.socket.connect = refused
        socket.getaddrinfo = refused
    """
    folder = tmp_path / "Klinik Süd 'A' 医院 🙂"
    done = run_process(
        quick, folder, no_network, LC_ALL="C", LANG="C", PYTHONUTF8="0", HOME=str(home), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    assert "network was asked" not in done.stderr + done.stdout
    assert (folder / "run" / "report.html").is_file()


def test_little_memory_is_one_sentence(quick: dict[str, Any], tmp_path: Path) -> None:
    """A batch whose logits alone need more than the process may have: what to lower, exit 1, and it can be resumed."""
    quick["local"] = {"lr": 0.01, "batch": 1024, "steps": 1, "accumulate": 1}
    limit = """
        import resource, torch, transformers, peft, weft.runs, weft.site.cohort, os
        from weft.core.points import _listeners
        size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        def tight(name):
            if name == "order:train":
                now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (now + 64 * 2**20, resource.RLIM_INFINITY))
        _listeners.append(tight)
    """
    (tmp_path / "low").mkdir()
    rows = [{"question": "What is gout? " * 3, "answer": "It is a disease. " * 3, "site": "s"} for _ in range(1024)]
    (tmp_path / "low" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_process(quick, tmp_path / "low", limit)
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory" in said
    assert "local.batch" in said
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk takes root")
def test_a_disk_that_is_full(quick: dict[str, Any], tmp_path: Path) -> None:
    """A real file system of one megabyte; what is on it stays sound, and with room again the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        (disk / "ballast").write_bytes(bytes(900_000))
        out = disk / "run"
        with pytest.raises(weft.core.errors.RunError, match=r"cannot write .*No space left on device"):
            weft.run(Job(**quick | {"rounds": 30}), out)
        (disk / "ballast").unlink()
        run = weft.run(Job(**quick | {"rounds": 30}), out, resume=True)
        assert adapter_hash(run) == adapter_hash(weft.run(Job(**quick | {"rounds": 30}), tmp_path / "whole"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_clocks_that_jump_change_nothing(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes back and forth by a year with every look at it."""
    expected = adapter_hash(weft.run(Job(**quick), tmp_path / "whole"))
    true, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return true() + 31_536_000 * (1 if looks[0] % 2 else -1)

    monkeypatch.setattr(time, "time", jumping)
    assert adapter_hash(weft.run(Job(**quick), tmp_path / "jumping")) == expected
