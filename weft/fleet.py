"""Where a run takes place on several devices: no base here, one in each worker."""

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weft.baselines import federation_of
from weft.core.errors import JobError, PolicyError, RunError
from weft.core.pipeline import leaves
from weft.core.round import Federation
from weft.core.types import Link
from weft.links import letters
from weft.links.crew import Carrier, Crew
from weft.links.local import Local
from weft.links.pool import Pool
from weft.links.workers import Spawned, devices_of
from weft.prepare import Prepared
from weft.site.secret import secret_of
from weft.spending import Account
from weft.watch import Watch
from weft.worker import TOKEN, Worker


@dataclass(frozen=True)
class Places:
    """The devices of a run, as the command names them; raise JobError for what is no place."""

    devices: str = ""
    """Such as `cpu*2` or `cuda`; one worker for each."""
    on: str = ""
    """`ray`: workers are actors of a Ray cluster."""
    address: str = ""
    """Of a Ray cluster that is there; empty: one on this machine, for this run."""

    def __post_init__(self) -> None:
        if self.on not in ("", "ray"):
            raise JobError(f"--on {self.on}: is none; write --on ray, or leave it out")
        if self.address and not self.on:
            raise JobError("--address: is that of a Ray cluster; add --on ray")

    def __bool__(self) -> bool:
        return bool(self.devices or self.on)


@dataclass(frozen=True)
class Fleet:
    """The workers of a run once they have loaded their bases: where a `Runner` finds its link."""

    prepared: Prepared
    crew: Crew
    threads: int
    notices: tuple[str, ...]
    examples: dict[str, int]
    groups: dict[str, int]
    spread: dict[str, Any]
    token: str = ""
    """What workers on other machines must find in the run folder, so that it is the same one."""

    simulated: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """Return what a run does, the federation first."""
        return ("federated", *self.prepared.job.baselines)

    def link(self, method: str, folder: Path, block: int, watch: Watch) -> Link:
        """Return the link to the clients of one method, divided among the workers."""
        folder, job = folder.resolve(), self.prepared.job
        if self.prepared.plan.recipe.dp or self.prepared.federation().wire.noise:
            secret_of(folder / "clients")  # made here: two workers would each make one
        self.crew.notice = _once(watch.notice)
        token = self.token and _left(folder, self.token)
        at = {"method": method, "folder": str(folder), "block": block, "token": token}
        groups = {} if job.evaluate.per_example else self.groups  # those scores are one file
        pool = Pool(self.crew, job.hash(), at, groups, self.crew.notice, watch.client)
        return Local([pool], job=job.hash())

    def federation(self, method: str) -> Federation:
        """Return the rounds of one method."""
        return federation_of(method, self.prepared.federation())

    def account(self) -> Account:
        """Return what the rounds spend of privacy, by the examples that are trained on."""
        return self.prepared.account(self.examples)

    def manifest(self) -> dict[str, Any]:
        """Return which record is where."""
        return self.spread


def _left(folder: Path, token: str) -> str:
    """Leave a token in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKEN).write_text(token)
    return token


def _once(notice: Callable[[str], None]) -> Callable[[str], None]:
    """Say nothing twice: several workers, and every round, may have the same to say."""
    said: set[str] = set()

    def tell(text: str) -> None:
        if text not in said:
            said.add(text)
            notice(text)

    return tell


@contextmanager
def opened(prepared: Prepared, places: Places, *, exact: bool, threads: int) -> Iterator[Fleet]:
    """Start the workers, let each load its base, and end them all, whatever happens."""
    if leaves(prepared.plan.pipeline).hidden:
        raise JobError(
            f"--{'on' if places.on else 'devices'}: the keys of simulated secure aggregation live in one process; "
            "leave it out"
        )
    carrier, share = _carrier(places)
    try:
        with prepared.job.located():
            fleet = _fleet(prepared, Crew(carrier), {"exact": exact, "threads": threads, "share": share})
        yield replace(fleet, token=secrets.token_hex(8)) if places.on else fleet
    finally:
        carrier.close()


def _carrier(places: Places) -> tuple[Carrier, int]:
    """Return the workers, and the threads that each may use."""
    if places.on:
        from weft.links import ray

        return ray.opened(places.devices, places.address, Worker)
    devices = devices_of(places.devices, torch.cuda.device_count)
    return Spawned(devices, "weft.worker"), max(1, torch.get_num_threads() // len(devices))


def _fleet(prepared: Prepared, crew: Crew, settings: dict[str, Any]) -> Fleet:
    job = prepared.job
    told = {"values": json.dumps(job.resolved()), "folder": str(job.folder.resolve()), **settings}
    rows = crew.each(letters.letter("open", job.hash(), **told))
    if any(row["records"] != [prepared.train.sha256, prepared.test.sha256] for row in rows):
        raise PolicyError("a worker reads other records; the files changed while it started, or are others there")
    if len({(row["mode"], row["threads"]) for row in rows}) > 1:
        modes = ", ".join(sorted({f"{row['mode']}, {row['threads']} threads" for row in rows}))
        raise RunError(f"workers would train in different ways ({modes}), and results depend on it; use equal devices")
    ((_, facts),) = crew.all([lambda: letters.letter("facts", job.hash())])
    known = {name: json.loads(facts[name]) for name in ("examples", "groups", "manifest")}
    notices = tuple(facts["notices"])
    return Fleet(prepared, crew, rows[0]["threads"], notices, known["examples"], known["groups"], known["manifest"])
