"""All of it on one machine: a coordinator and some sites as real processes, with real keys and TLS on loopback."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from weft import identity
from weft.core.errors import JobError, RunError
from weft.job import load

PER_SITE = 16  # records of a site; a quarter of them for tests
START = 60.0  # seconds within which the coordinator's port must be open


@dataclass
class Party:
    """One process of the demo, whose lines are shown under its name."""

    name: str
    folder: Path
    command: list[str]
    say: Callable[[str], None]
    program: tuple[str, ...] = ("-m", "weft")
    """What Python runs; a benchmark may put itself around it."""
    process: subprocess.Popen[str] | None = None
    lines: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Start the process and show what it says."""
        self.process = subprocess.Popen(
            [sys.executable, *self.program, *self.command],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._show, daemon=True).start()

    def _show(self) -> None:
        assert self.process
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self.say(f"{self.name:>12} | {line.rstrip()}")

    def stop(self) -> None:
        """End the process, if it has not ended."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


def demo(folder: Path, sites: int, say: Callable[[str], None]) -> Path:
    """Lay out the folders of a coordinator and its sites, run them, and return the run folder.

    Raise JobError where the folder is in use, RunError where one of the processes fails.
    """
    if folder.exists() and any(folder.iterdir()):
        raise JobError(f"--out {folder}: is not empty; choose another folder, or remove it")
    names = [f"hospital-{chr(97 + i)}" for i in range(sites)]
    job, port = lay_out(folder, names), free_port()
    serve = Party("coordinator", job.parent, ["serve", job.name, "--listen", f"127.0.0.1:{port}"], say)
    joins = [site_of(folder, name, port, load(job).hash(), say) for name in names]
    say(f"the folders of {sites} sites and a coordinator are in {folder}; each knows only its own")
    try:
        serve.start()
        wait_for_port(serve, port)
        for party in joins:
            party.start()
        return _end(serve, joins)
    finally:
        for party in (serve, *joins):
            party.stop()


def lay_out(folder: Path, names: list[str]) -> Path:
    """Write the job, a tiny model with random weights, and each site's records and key; return the job file."""
    from weft.testing import tiny

    for name in ("coordinator", "model", *names):
        (folder / name).mkdir(parents=True)
    model: Any = tiny.model()
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    members = {}
    for place, name in enumerate(names):
        key = identity.new()
        identity.save(key, folder / name / f"{name}.key")
        members[name] = {"key": key.public}
        rows = [tiny.RECORDS[(PER_SITE * place + i) % len(tiny.RECORDS)] for i in range(PER_SITE)]
        _write_records(folder / name / "train.jsonl", rows[PER_SITE // 4 :])
        _write_records(folder / name / "test.jsonl", rows[: PER_SITE // 4])
    job = folder / "coordinator" / "job.yaml"
    values = {
        "model": {"name": "tiny"},
        "adapter": {"lora": {"rank": 4, "alpha": 8}},
        "task": {"causal_lm": {"template": "plain", "max_length": 64}},
        "data": {},
        "local": {"lr": 0.01, "batch": 4},
        "rounds": 3,
        "evaluate": {"on": ["loss"]},
        "seed": 7,
        "sites": members,
    }
    job.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf8")
    return job


def _write_records(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def site_of(folder: Path, name: str, port: int, accepted: str, say: Callable[[str], None]) -> Party:
    """Return the process of one site, which accepts one job."""
    command = ["join", f"127.0.0.1:{port}", "--as", name, "--data", "train.jsonl", "--test", "test.jsonl"]
    command += ["--model", str((folder / "model").resolve()), "--accept", accepted]
    return Party(
        name, folder / name, [*command, "--ca", str((folder / "coordinator/weft-certs/ca.pem").resolve())], say
    )


def free_port() -> int:
    """Return a port of loopback that nobody uses now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for_port(serve: Party, port: int) -> None:
    """Wait until the coordinator listens; raise RunError where it does not."""
    until = time.monotonic() + START
    while time.monotonic() < until and serve.process and serve.process.poll() is None:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RunError(f"the coordinator did not start: {' '.join(serve.lines[-3:])}")


def _end(serve: Party, joins: list[Party]) -> Path:
    """Wait for all of them; a site that fails ends the demo."""
    assert serve.process
    while serve.process.poll() is None:
        failed = [party for party in joins if party.process and party.process.poll()]
        if failed:
            raise RunError(f"{failed[0].name} failed: {' '.join(failed[0].lines[-1:])}")
        time.sleep(0.2)
    for party in (serve, *joins):
        assert party.process
        if party.process.wait(60):
            raise RunError(f"{party.name} failed: {' '.join(party.lines[-1:])}")
    return serve.folder / "runs" / "job"
