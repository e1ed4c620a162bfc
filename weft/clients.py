"""The job's section `clients`, resolved: each client's device, its ranks, what the server knows of it, the sampler."""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from weft import plugins
from weft.core.errors import JobError, KeyProblem
from weft.core.pace import Pace
from weft.core.sampling import UNIFORM, Device, Member, Sampler
from weft.core.task import Task
from weft.core.types import Adapter, Algorithm, Facts
from weft.job import DeviceProfile, Job

DEFAULT = "default"  # the pattern of those that no other matches


@dataclass(frozen=True)
class Crowd:
    """Who the clients of a job are, and how they are asked."""

    sampler: Sampler = UNIFORM
    members: Mapping[str, Member] = field(default_factory=dict)
    pace: Pace | None = None

    def even(self, per_round: int | None) -> bool:
        """Tell whether all clients are asked equally often: by their sampler, or because it leaves nobody out."""
        everyone = (per_round or len(self.members)) == len(self.members)
        return self.sampler.even or (everyone and self.sampler.fixed)


def crowd(job: Job, clients: Mapping[str, Sized], steps_of: Callable[[int], int]) -> Crowd:
    """Return what is known of a job's clients; steps_of: training records -> optimizer steps of a round."""
    sampler: Sampler = plugins.build(job.clients.sampler, "sampler")
    if sampler.open:
        sampler = sampler.open(job.folder)
    profiles, usual = _profiles(job, clients), Device()
    alike: dict[tuple[int, int], Member] = {}  # (records, profile): one object for all that are alike
    members = {}
    for name, rows in clients.items():
        profile = profiles.get(name)
        key = len(rows), id(profile)
        if key not in alike:
            alike[key] = Member(len(rows), steps_of(len(rows)), _device(profile) if profile else usual)
        members[name] = alike[key]
    pace: Pace | None = plugins.build(job.clients.pace, "pace") if job.clients.pace else None
    return Crowd(sampler, members, pace)


def check(job: Job, who: Crowd, facts: Facts, algorithm: Algorithm) -> None:
    """Refuse a job that its sampler or its pace is not defined for."""
    if clause := _unsound(job, who.sampler, facts):
        raise KeyProblem(("clients", "sampler"), f"{job.clients.sampler.name} {clause}")
    try:
        who.sampler.check(facts, who.members)
    except JobError as error:
        raise KeyProblem(("clients", "sampler"), str(error)) from None
    if who.pace and job.clients.pace and (clause := _unfit(job, who.pace, facts, algorithm)):
        raise KeyProblem(("clients", "pace"), f"{job.clients.pace.name} {clause}")


def _unsound(job: Job, sampler: Sampler, facts: Facts) -> str | None:
    """Say why a sampler cannot draw cohorts that must not depend on what clients tell, or on the server."""
    if facts.hidden and job.clients.sampler.name != "uniform":
        return "leaves the draw to the server, and under a mask clients draw their cohort themselves: choose uniform"
    if sampler.learns and (facts.noise or facts.dp):
        return "draws by what clients told, such as losses, which no privacy account covers: choose uniform or poisson"
    return None


def _unfit(job: Job, pace: Pace, facts: Facts, algorithm: Algorithm) -> str | None:
    """Say why a server that does not wait cannot do a job."""
    name = job.algorithm.name
    if algorithm.combine or not algorithm.stale:
        return (
            f"takes updates that began at older states, which {name} is not defined for: choose fedavg, or leave it out"
        )
    if job.clients.sampler.name != "uniform":
        sampler = job.clients.sampler.name
        return f"draws a client whenever one is done, not a cohort as {sampler} does: leave one of them out"
    if facts.hidden or facts.noise or facts.dp:
        hides = "secure aggregation" if facts.hidden else "the privacy account"
        return f"sums each state's replies for itself, and {hides} is over a round's whole cohort: leave it out"
    if facts.adapts:
        return "takes updates that began at other lengths, and clip adapts one that all have: leave clip.quantile out"
    if job.downlink:
        return "keeps the states that clients began with as they were, and downlink rounds them: leave one of them out"
    if pace.buffer > facts.clients:
        return f"waits for {pace.buffer} clients, and this split has {facts.clients}: lower buffer"
    return None


def paced(algorithm: Algorithm, pace: Pace | None) -> Algorithm:
    """Return an algorithm with how far it may go at once where the server multiplies fresh updates by more than one."""
    if pace is None or algorithm.reach is None:
        return algorithm
    return replace(algorithm, reach=algorithm.reach * max(1.0, pace.factor(0)))


def _device(profile: DeviceProfile) -> Device:
    return Device(profile.seconds_per_step, profile.bandwidth, profile.jitter)


def _profiles(job: Job, clients: Mapping[str, object]) -> dict[str, DeviceProfile]:
    """Return the device of each client that has one."""
    _check_patterns(("clients", "devices"), job.clients.devices, clients)
    return _matched(job.clients.devices, clients)


def _matched(patterns: Mapping[str, Any], clients: Mapping[str, object]) -> dict[str, Any]:
    """Return what the last pattern says that a client's name matches, or `default`, for clients with either."""
    found = {}
    for name in clients:
        own = [value for pattern, value in patterns.items() if pattern != DEFAULT and fnmatchcase(name, pattern)]
        if own or DEFAULT in patterns:
            found[name] = own[-1] if own else patterns[DEFAULT]
    return found


def _check_patterns(place: tuple[str, ...], patterns: Mapping[str, Any], clients: Mapping[str, object]) -> None:
    for pattern in patterns:
        if pattern != DEFAULT and not any(fnmatchcase(name, pattern) for name in clients):
            known = ", ".join(list(clients)[:5])
            raise KeyProblem((*place, pattern), f"matches no client (they are {known} ...)")


def ranks(job: Job, adapter: Adapter, clients: Mapping[str, object]) -> dict[str, int]:
    """Return the ranks of each client, by its name or by its device; none where the job speaks of none."""
    by_device = {pattern: profile.rank for pattern, profile in job.clients.devices.items() if profile.rank}
    sources: Sequence[tuple[tuple[str, ...], Mapping[str, int]]] = (
        (("clients", "devices"), by_device),
        (("clients", "ranks"), job.clients.ranks),
    )
    if not any(patterns for _, patterns in sources):
        return {}
    most = _most(job, adapter, next(place for place, patterns in sources if patterns))
    for place, patterns in sources:
        _check_patterns(place, patterns, clients)
        for pattern, rank in patterns.items():
            if rank > most:
                clause = f"{rank} is more than adapter.{job.adapter.name}.rank, {most}"
                raise KeyProblem((*place, pattern), clause)
    own = {name: profile.rank or most for name, profile in _matched(job.clients.devices, clients).items()}
    return dict.fromkeys(clients, most) | own | _matched(job.clients.ranks, clients)


def _most(job: Job, adapter: Adapter, place: tuple[str, ...]) -> int:
    """Return the adapter's own rank; refuse one that has none to give."""
    most = job.adapter.keys.get("rank")
    if adapter.products is None or most is None:
        raise KeyProblem(place, f"{job.adapter.name} has no ranks; use lora, or leave it out")
    if job.adapter.keys.get("init") == "pissa":
        clause = "pissa starts from factors of the base, and a client with fewer of them would start from another model"
        raise KeyProblem(place, f"{clause}; set adapter.lora.init to default, or leave it out")
    return int(most)


def check_enough(task: Task, clients: Mapping[str, Sized]) -> None:
    """Refuse a client with too few records to compare."""
    for name, rows in clients.items():
        if len(rows) < task.least:
            raise KeyProblem(
                ("data", "split"),
                f"client {name} has a single record, and the task compares records of one client with each other; "
                "split otherwise, or leave that client out",
            )


def check_cohort(job: Job, clients: int) -> None:
    """Refuse a round that would ask more clients than there are."""
    if job.clients.per_round and job.clients.per_round > clients:
        clause = f"{job.clients.per_round} is more than the {clients} clients"
        raise KeyProblem(("clients", "per_round"), f"{clause} of this split" if not job.sites else clause)
