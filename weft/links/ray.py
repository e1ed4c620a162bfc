"""Workers on a Ray cluster: an actor for each GPU, or for each machine where there are none; letters as everywhere.

The machines share the files: job, records, model and run folder stand at the same paths; all have the same Weft.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from weft.core.errors import JobError, RunError
from weft.links.workers import devices_of


@dataclass(frozen=True)
class Room:
    """What an actor asks of the cluster."""

    cores: int
    gpus: int = 0
    node: str = ""
    """The machine that it must be on; empty: any."""


@dataclass
class Actors:
    """Actors that wait for letters; a `Carrier`."""

    handles: Sequence[Any]
    names: Sequence[str]
    pending: dict[Any, int] = field(default_factory=dict)
    """What was asked -> the worker that was asked."""
    reasons: dict[int, str] = field(default_factory=dict)

    def send(self, worker: int, letter: bytes) -> None:
        """Ask an actor; that it is gone is seen where the answer is waited for."""
        self.pending[self.handles[worker].answer.remote(letter)] = worker

    def receive(self) -> tuple[int, bytes | None]:
        """Wait for any actor's answer, or its end."""
        import ray

        (ready, *_), _ = ray.wait(list(self.pending), num_returns=1)
        worker = self.pending.pop(ready)
        try:
            answer: bytes = ray.get(ready)
        except ray.exceptions.RayError as error:
            self.reasons[worker] = " ".join(str(error).split()).split(". ")[0][:300]
            return worker, None
        return worker, answer

    def ended(self, worker: int) -> str:
        """Say how an actor ended."""
        return f"ended ({self.reasons.get(worker, 'its machine is gone')})"

    def close(self) -> None:
        """Leave the cluster, which ends the actors; one that was begun for this run ends with them."""
        import ray

        ray.shutdown()


def opened(devices: str, address: str, make: Callable[[], Any]) -> tuple[Actors, int]:
    """Start actors that each hold what `make` gives; return them and the threads that each may use.

    Raise JobError where Ray is not installed or has less than is asked for, RunError where no cluster answers.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise JobError("--on ray: Ray is not installed; run `pip install 'weft-fl[ray]'`") from None
    _join(ray, address)
    try:
        rooms = _rooms(devices, [node for node in ray.nodes() if node["Alive"]])
        actor = ray.remote(_Actor)
        handles = [actor.options(**_options(room)).remote(make) for room in rooms]
    except BaseException:
        ray.shutdown()
        raise
    names = [f"worker {number} ({_called(room)})" for number, room in enumerate(rooms, start=1)]
    return Actors(handles, names), min(room.cores for room in rooms)


class _Actor:
    def __init__(self, make: Callable[[], Any]) -> None:
        self.worker = make()

    def answer(self, letter: bytes) -> bytes:
        answer: bytes = self.worker.answer(letter)
        return answer


def _join(ray: Any, address: str) -> None:
    """Join a cluster, or begin one on this machine, which runs in this environment."""
    there = address or os.environ.get("RAY_ADDRESS", "")
    variables = {"OMP_WAIT_POLICY": "PASSIVE"}
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not there:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        variables["PYTHONPATH"] = os.pathsep.join(place or os.getcwd() for place in sys.path)
        settings["include_dashboard"] = False
    try:
        _knock(there)
        with _own_signals():
            ray.init(address=there or "local", runtime_env={"env_vars": variables}, **settings)
    except Exception as error:  # a bare one where Ray has waited half a minute for its own processes
        reason = " ".join(str(error).split()).split(". ")[0][:300]
        what = f"--address {there}: no Ray cluster answers there" if there else "--on ray: Ray does not start here"
        raise RunError(f"{what} ({reason})") from None


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does on SIGTERM, which Ray would change."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _rooms(devices: str, nodes: Sequence[Any]) -> list[Room]:
    """Return what each actor gets: what --devices says of all machines together, or each GPU, or each machine.

    >>> nodes = [{"NodeID": "a", "Resources": {"CPU": 8.0}}, {"NodeID": "b", "Resources": {"CPU": 4.0}}]
    >>> _rooms("", nodes)
    [Room(cores=8, gpus=0, node='a'), Room(cores=4, gpus=0, node='b')]
    >>> _rooms("cpu*3", nodes)
    [Room(cores=4, gpus=0, node=''), Room(cores=4, gpus=0, node=''), Room(cores=4, gpus=0, node='')]
    """
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes}
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
    if devices:
        names = devices_of(devices, lambda: sum(gpus.values()))
        share = sum(cores.values()) // len(names)
        if not share:
            raise JobError(f"--devices {devices}: the cluster has {sum(cores.values())} cores; ask for fewer workers")
        return [Room(share, 0 if name == "cpu" else 1) for name in names]
    if any(gpus.values()):
        return [Room(max(1, cores[node] // count), 1, node) for node, count in gpus.items() for _ in range(count)]
    return [Room(count, 0, node) for node, count in cores.items() if count]


def _options(room: Room) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    placed = {"scheduling_strategy": NodeAffinitySchedulingStrategy(room.node, soft=False)} if room.node else {}
    return {"num_cpus": room.cores, "num_gpus": room.gpus, **placed}


def _called(room: Room) -> str:
    where = f" of {room.node[:8]}" if room.node else ""
    cores = f"{room.cores} core{'s' * (room.cores > 1)}"
    return f"{'a GPU' if room.gpus else cores}{where}"
