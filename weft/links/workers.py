"""Worker processes of this machine, one for each device, over a socket pair each; nothing but Python and torch.

A process is started anew and not forked: threads and a GPU's context do not survive a fork. Whoever ends first takes
the other along: a worker reads the end of its socket at once, also while it trains.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO

from weft.core.errors import JobError
from weft.site.allocator import tuned

PATIENCE = 5.0  # seconds that a worker has to end by itself
_DEVICE = re.compile(r"(cpu|cuda|cuda:\d+)(?:\*(\d{1,3}))?")


def devices_of(text: str, gpus: Callable[[], int]) -> tuple[str, ...]:
    """Return the device of each worker: `cuda` is every GPU, `cpu*2` the processor twice.

    >>> devices_of("cpu*2", lambda: 0)
    ('cpu', 'cpu')
    >>> devices_of("cuda", lambda: 2)
    ('cuda:0', 'cuda:1')
    """
    found: list[str] = []
    for word in text.split(","):
        match = _DEVICE.fullmatch(word.strip())
        if not match or match[2] == "0":
            raise JobError(f"--devices {text}: `{word}` is none; write cpu*4, cuda (every GPU) or cuda:0,cuda:1")
        here = gpus() if match[1] != "cpu" else 0
        names = [f"cuda:{number}" for number in range(here)] if match[1] == "cuda" else [match[1]]
        if not names or (match[1] not in ("cpu", "cuda") and int(match[1][5:]) >= here):
            raise JobError(f"--devices {text}: there is no {match[1]}; this machine has {here} GPUs that torch can use")
        found += names * int(match[2] or 1)
    return tuple(found)


def visible(device: str, among: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES for a process that has one device; among: what this process has there.

    >>> visible("cuda:1", None), visible("cuda:1", "4,6"), visible("cpu", "4,6")
    ('1', '6', '')
    """
    if device == "cpu":
        return ""
    number = int(device.removeprefix("cuda:"))
    return among.split(",")[number].strip() if among else str(number)


@dataclass
class Spawned:
    """Processes that wait for letters; a `Carrier`."""

    devices: Sequence[str]
    module: str
    """What each runs, as `python -m` does, with the number of its socket."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    channels: list[Connection] = field(default_factory=list)
    said: list[IO[bytes]] = field(default_factory=list)
    """What each wrote to its standard error."""
    files: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        try:
            for device in self.devices:
                self._start(device)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """Return the number and the device of each worker."""
        return [f"worker {number} ({device})" for number, device in enumerate(self.devices, start=1)]

    def _start(self, device: str) -> None:
        ours, theirs = Pipe()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)  # plug-ins of the user's own are found
        seen = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": visible(device, os.environ.get("CUDA_VISIBLE_DEVICES"))}
        said = self.files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - close() does
        self.said.append(said)
        self.channels.append(ours)
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", self.module, str(theirs.fileno())],
                env=tuned({"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **seen}),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        )
        theirs.close()

    def send(self, worker: int, letter: bytes) -> None:
        """Write a letter; that nobody reads it is seen where the answer is waited for."""
        try:
            self.channels[worker].send_bytes(letter)
        except OSError:
            self.processes[worker].kill()

    def receive(self) -> tuple[int, bytes | None]:
        """Wait for any worker's answer, or its end."""
        open_ = {id(channel): number for number, channel in enumerate(self.channels) if not channel.closed}
        (ready, *_) = wait([channel for channel in self.channels if not channel.closed])
        worker = open_[id(ready)]
        try:
            return worker, self.channels[worker].recv_bytes()
        except (EOFError, OSError):
            self.channels[worker].close()
            return worker, None

    def ended(self, worker: int) -> str:
        """Say how a worker ended, with the last line that it wrote."""
        process = self.processes[worker]
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code == -signal.SIGKILL:
            return "was killed (signal 9: by hand, or by a system that runs out of memory)"
        self.said[worker].seek(0)
        last = self.said[worker].read().decode(errors="replace").strip().splitlines()[-1:]
        return (
            f"ended ({f'signal {-code}' if code < 0 else f'code {code}'}{''.join(f': {line[:300]}' for line in last)})"
        )

    def close(self) -> None:
        """End all processes and wait for them."""
        for channel in self.channels:
            channel.close()
        for process in self.processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.files.close()
