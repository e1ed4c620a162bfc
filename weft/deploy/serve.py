"""The coordinator: wait for the named sites, agree with them, run the rounds; no language model is ever loaded here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft import prepare
from weft.core.errors import JobError, PolicyError, RunError, WeftError
from weft.core.meeting import threshold
from weft.core.round import Federation
from weft.core.types import Link, Question
from weft.data.split import natural
from weft.deploy import agree
from weft.deploy.certificates import Certificates
from weft.job import Job
from weft.links import letters
from weft.links.flower import Flower, missing
from weft.links.flower.hub import ROOM, Hub
from weft.run_folder import check_folder, clear, read_json
from weft.runs import Run, Runner
from weft.site.allocator import return_freed_memory
from weft.sites import at_coordinator, pinned
from weft.spending import Account
from weft.store import locked
from weft.watch import Watch

FAREWELL = 20.0  # seconds that sites have to fetch the adapter when all is done
GONE = 300.0  # seconds of silence after which nobody waits for a site to say farewell
HERE = ("untrained",)  # baselines that need no second training and no records


@dataclass(frozen=True)
class Meeting:
    """The sites of a run after they have agreed: where a `Runner` finds its link."""

    prepared: prepare.Prepared
    flower: Flower
    described: Mapping[str, Mapping[str, Any]]
    notices: tuple[str, ...]
    simulated: bool = False

    def account(self) -> Account:
        """Return what the rounds spend of privacy, by the numbers of records that the sites gave, if they must."""
        return self.prepared.account({site: row["records"].get("train", 1) for site, row in self.described.items()})

    @property
    def methods(self) -> tuple[str, ...]:
        """Return what is run: the federation, and the baselines that need nothing else."""
        return ("federated", *(name for name in self.prepared.job.baselines if name in HERE))

    def link(self, method: str, folder: Path, block: int, watch: Watch) -> Link:
        """Return the link to the sites."""
        return Agreed(self.flower, next(iter(self.described.values())))

    def federation(self, method: str) -> Federation:
        """Return the job's rounds, whose sums are opened with the sites that the job pins."""
        ours, job = self.prepared.federation(), self.prepared.job
        return replace(ours, secure=letters.counted(pinned(job).coordinator())) if ours.wire.hidden else ours

    def manifest(self) -> dict[str, Any]:
        """Return who has how many records; which ones is known at the sites alone."""
        records = {site: dict(row["records"]) for site, row in self.described.items()}
        told = {site: row["train"] for site, row in records.items() if "train" in row}  # under a mask they do not say
        return {
            "clients": {site: {"histogram": {}} | ({"size": told[site]} if site in told else {}) for site in records},
            "train": {"records": sum(told.values()) if told else None, "skipped": 0, "bad": []},
            "test": {"records": sum(row["test"] for row in records.values()), "skipped": 0, "bad": []},
            "test_groups": {site: row["test"] for site, row in records.items() if row["test"]},
        }


@dataclass(frozen=True)
class Agreed:
    """The link to sites that have described themselves already."""

    flower: Flower
    described: Mapping[str, Any]

    def exchange(self, order: Any) -> Iterator[Any]:
        """Send an order to the sites."""
        return self.flower.exchange(order)

    def ask(self, question: Question) -> list[Any]:
        """Ask the sites; what they are was asked when they agreed."""
        return [self.described] if question.kind == "describe" else self.flower.ask(question)


@dataclass(frozen=True)
class Place:
    """Where a coordinator listens, and how it stops waiting."""

    address: tuple[str, int]
    certificates: Certificates
    absent: float = 600.0
    """Seconds after which a silent site is lost, where the job sets no deadline."""
    room: int = ROOM
    """Bytes of replies that are taken at a time."""


def serve(
    job: Job,
    folder: Path,
    place: Place,
    watch: Watch,
    *,
    resume: bool = False,
    overwrite: bool = False,
    exact: bool = False,
) -> Run:
    """Run a job between the real sites that it names, and return the finished run.

    Raise JobError for a job that cannot run, PolicyError where sites differ or refuse, RunError for one that failed
    on the way; `resume` goes on where a run stopped.
    """
    check_folder(folder, job, resume, overwrite)
    return_freed_memory()
    if resume:
        exact = read_json(folder / "run.json")["exact"]
    prepared = at_coordinator(job)
    with locked(folder), _open(job, place, watch) as flower:
        if overwrite:
            clear(folder)
        meeting = _meet(prepared, flower, exact, resume)
        run = Runner(folder, meeting, watch, exact, 0, 1).run()
        _say_farewell(flower, None, _adapter(folder))
    return run


@contextmanager
def _open(job: Job, place: Place, watch: Watch) -> Iterator[Flower]:
    """Listen; tell the sites why where the run ends otherwise than by a finished run or a stopped process."""
    hub = Hub({name: site.key for name, site in job.sites.items()}, watch.notice, room=place.room)
    port = hub.start(place.address, place.certificates.cert, place.certificates.key)
    watch.notice(f"listening on {place.address[0]}:{port}; sites need {place.certificates.ca}")
    clients = {name: (name,) for name in sorted(job.sites, key=natural)}
    flower = Flower(hub, job.hash(), clients, watch.notice, job.failures.deadline, place.absent)
    try:
        yield flower
    except WeftError as error:
        _say_farewell(flower, str(error), {})
        raise
    finally:
        hub.stop()


def _meet(prepared: prepare.Prepared, flower: Flower, exact: bool, resume: bool) -> Meeting:
    """Wait for the sites, let them accept the job, ask what they have and compare it.

    A new run needs all of them; one that goes on, those that come within `absent` seconds.
    """
    job = prepared.job
    patient = replace(flower, deadline=flower.absent if resume else None, absent=flower.absent if resume else 1e9)
    away = missing(job.sites, flower.hub)
    if away:
        flower.say(f"waiting for {', '.join(away)}; job {job.hash()[:16]}")
    tree = {"values": job.resolved(), "exact": exact}
    accepted = _all(patient, "job", **tree)
    described = _all(patient, "question", kind="describe", body={"base": prepared.base.path})
    if not accepted or not described:
        raise RunError(f"none of the sites came within {flower.absent:.0f} s; go on with --resume when they are there")
    bodies = {site: row["body"] for site, row in described.items()}
    notices = agree.check(bodies)
    if prepared.federation().wire.hidden:
        notices.append(_masked(job))
    left = [name for name in job.baselines if name not in HERE]
    if left:
        notices.append(f"left out: {' and '.join(left)}, which would need other training or all records in one place")
    first = next(iter(bodies.values()))
    return Meeting(replace(prepared, classes=tuple(first["classes"])), flower, bodies, tuple(notices))


def _masked(job: Job) -> str:
    """Say what secure aggregation asks of the sites."""
    cohort = job.clients.per_round or len(job.sites)
    least = threshold(cohort)
    drops = "none may drop out" if least == cohort else f"{cohort - least} may drop out"
    stays = "" if job.failures.on_client_failure != "abort" else "; the first that does ends the run, by failures"
    return (
        f"updates are masked: only the sum of a round's {cohort} sites is opened, once {least} have stayed to the end "
        f"({drops}{stays if least < cohort else ''})"
    )


def _all(flower: Flower, what: str, /, **tree: Any) -> dict[str, dict[str, Any]]:
    """Send one letter to every site; return their answers, and raise PolicyError where one refuses."""
    tickets = {flower.send(site, what, **tree): site for site in flower.clients}
    answers = {}
    for site, content, _ in flower.arriving(tickets):
        if isinstance(content, RunError):
            flower.say(f"{site} {content}")
            continue
        answer = letters.opened(content, ("accepted", "answer", "failure"), flower.job)
        if answer["is"] == "failure":
            raise PolicyError(f"{site}: {str(answer.get('reason'))[:1000]}")
        flower.say(f"{site} {'accepted the job' if answer['is'] == 'accepted' else 'is ready'}")
        answers[site] = answer
    return {site: answers[site] for site in flower.clients if site in answers}


def _say_farewell(flower: Flower, reason: str | None, adapter: dict[str, bytes]) -> None:
    """Tell the sites that it is over, and give them the adapter."""
    brief = replace(flower, deadline=FAREWELL)
    here = [site for site in flower.clients if (flower.hub.silent(site) or GONE) < GONE]
    tickets = {flower.send(site, "end", reason=reason, adapter=adapter): site for site in here}
    for site, content, _ in brief.arriving(tickets):
        if isinstance(content, RunError):
            flower.say(f"{site} was not told that it is over")


def _adapter(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


def address_of(text: str) -> tuple[str, int]:
    """Return (host, port) of `host:port`; raise JobError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise JobError(f"{text}: write HOST:PORT, such as 0.0.0.0:9092")
    return host.strip("[]"), int(port)
