"""What a site allows, in its own file: a job that asks for more is refused there, with the reason."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft import plugins, yaml12
from weft.core.errors import JobError, PolicyError
from weft.core.types import Wire
from weft.deploy.told import Cost
from weft.job import Job

MOST_BYTES = 100_000  # no policy is larger


class Policy(BaseModel):
    """A site's limits; what is not given is not limited."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    adapters: list[str] | None = None
    """Names of the adapters that may be trained; all of Weft's when not given."""
    algorithms: list[str] | None = None
    """The same for algorithms."""
    tasks: list[str] | None = None
    """The same for tasks."""
    code: list[str] = []
    """Plug-ins of this site's own, package.module:function, that a job may name; no others are ever imported."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Most optimizer steps in one round."""
    max_rounds: Annotated[int, Field(gt=0)] | None = None
    """Most rounds of a job."""
    max_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory that the process may take; training that needs more fails, and the machine does not."""
    max_message_mb: Annotated[int, Field(gt=0)] = 4096
    """Largest message that is read."""
    plaintext_updates: Literal["accept", "refuse"] = "accept"
    """Whether updates may leave without secure aggregation, so that the coordinator sees each one."""
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    """Most that all jobs of this folder together may tell of one record, or of one unit, by noise that sites add."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """At which `max_epsilon` holds."""
    min_sites: Annotated[int, Field(gt=0)] = 2
    """Fewest sites that take part, this one included."""
    patience: Annotated[float, Field(ge=0)] = 86400.0
    """Seconds for which a coordinator that is away is tried again."""


@dataclass(frozen=True)
class Asked:
    """What a job asks of a site, as far as limits are concerned."""

    job: Job
    wire: Wire
    steps: int
    records: int = 0
    cost: Cost | None = None
    """Of one round; None: no noise is added at the sites."""
    told: float = 0.0
    """The epsilon that earlier jobs have cost this site, at its policy's delta."""
    epsilon: float = inf
    """The same with all rounds of this job."""


def read(path: Path | None) -> Policy:
    """Read a policy file; without one, nothing is limited but foreign code. Raise JobError for a wrong one."""
    if path is None:
        return Policy()
    if not path.is_file():
        raise JobError(f"--policy {path}: there is no such file")
    values, lines = yaml12.read(path.read_bytes()[:MOST_BYTES].decode("utf-8-sig", "replace"), path.name)
    if not isinstance(values, Mapping):
        raise JobError(f"{path.name}: a policy is a mapping of keys such as max_steps; this is not")
    try:
        return Policy(**values)
    except ValidationError as error:
        problem = plugins.problem(error, Policy, values, ())
        line = lines.get(problem.path[:1])
        raise JobError(f"{path.name}{f', line {line}' if line else ''}: {problem}") from None


def check_code(policy: Policy, values: Mapping[str, Any]) -> None:
    """Refuse foreign code before a job is even parsed: to parse is to import what it names."""
    for text in _texts(values):
        if plugins.is_own(text) and text not in policy.code:
            raise PolicyError(
                f"the job names code of its own, `{text}`, and this site's policy does not list it in `code`"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def check(policy: Policy, asked: Asked) -> None:
    """Raise PolicyError for the first thing that a job asks and this site does not allow."""
    job = asked.job
    for kind in ("adapter", "algorithm", "task"):
        name, allowed = getattr(job, kind).name, getattr(policy, f"{kind}s")
        if allowed is not None and name not in allowed:
            raise _refusal(kind, name, f"{kind}s", ", ".join(allowed) or "none")
    limits = (
        ("steps in a round", asked.steps, "max_steps", policy.max_steps),
        ("rounds", job.rounds, "max_rounds", policy.max_rounds),
    )
    for what, wanted, key, most in limits:
        if most is not None and wanted > most:
            raise _refusal(what, str(wanted), key, str(most))
    if len(job.sites) < policy.min_sites:
        raise _refusal("sites", str(len(job.sites)), "min_sites", str(policy.min_sites))
    if policy.plaintext_updates == "refuse" and not asked.wire.hidden:
        raise PolicyError(
            "the job sends each update as it is, and this site's policy has plaintext_updates: refuse; "
            "the job needs secure aggregation in its pipeline"
        )
    if policy.max_epsilon is not None:
        _check_epsilon(policy.max_epsilon, policy.delta, asked)


def _check_epsilon(most: float, delta: float, asked: Asked) -> None:
    if delta * asked.records >= 1:
        raise PolicyError(
            f"this site's policy has delta: {delta:g}, which is not below one over its {asked.records} records, so "
            f"that one of them could be given away; set it to {0.1 / asked.records:.1g} or less"
        )
    if asked.cost is None:
        raise PolicyError(
            f"the job adds no noise at this site, and this site's policy has max_epsilon: {most:g}; the job needs "
            "local.dp, or discrete_noise before mask"
        )
    if asked.epsilon > most:
        earlier = f", {asked.told:.4g} of it told in earlier jobs," if asked.told else ""
        raise PolicyError(
            f"{asked.job.rounds} rounds of the job come to epsilon {asked.epsilon:.4g} at delta {delta:g} for "
            f"{asked.cost.unit}{earlier} and this site's policy allows max_epsilon: {most:g}"
        )


def _refusal(what: str, wanted: str, key: str, allowed: str) -> PolicyError:
    return PolicyError(f"the job asks for {what}: {wanted}, and this site's policy allows {key}: {allowed}")


def limit_memory(policy: Policy) -> None:
    """Let the system refuse this process more memory than the policy allows."""
    if policy.max_memory_gb is not None:
        import resource

        most = int(policy.max_memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
