"""job.yaml <-> frozen, validated values; errors name the file, the line and the key; the job's hash."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from weft import plugins, yaml12
from weft.core.errors import JobError, KeyProblem, near
from weft.located import Source
from weft.plugins import Choice

MOST_BYTES = 1_000_000  # no job is larger


_LIST = Field(strict=False)  # a list may stand for a tuple


class _Values(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )


class Model(_Values):
    """The frozen base model."""

    name: Annotated[str, Field(min_length=1)]
    """A folder (relative to the job file) or a Hugging Face name."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["8bit", "4bit"] | None = None
    """Hold the frozen weights in so many bits, by bitsandbytes: LLM.int8(), or nf4 with double quantisation (QLoRA)."""
    random: bool = False
    """Random weights from the folder's config.json: for tests, for architectures without weights at hand."""


class Data(_Values):
    """Where the records come from and how they are divided among clients."""

    train: Annotated[str, Field(min_length=1)] | None = None
    """Of a simulation; real sites name their own files, and a job for them may leave it out."""
    test: str | None = None
    split: Choice | None = None
    """Of a simulation: how the records are divided among clients."""
    columns: dict[str, str] = {}
    """Standard column name -> the file's own."""
    on_bad_record: Literal["refuse", "skip"] = "refuse"
    bad_record_cap: Annotated[float, Field(ge=0, lt=1)] = 0.01
    limit: Annotated[int, Field(gt=0)] | None = None
    """Read at most this many records of each file."""


class DeviceProfile(_Values):
    """The machine of some clients: what a simulated clock, the sampler `utility` and ranks go by."""

    seconds_per_step: Annotated[float, Field(gt=0)] = 1.0
    """Virtual seconds of an optimizer step."""
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """Bytes a virtual second, each way; without it traffic takes no time."""
    jitter: Annotated[float, Field(ge=0)] = 0.0
    """How much the time of a round varies: the standard deviation of its logarithm."""
    rank: Annotated[int, Field(gt=0)] | None = None
    """Ranks of a low-rank adapter that such a client trains; `clients.ranks` goes before it."""


class Clients(_Values):
    """Who takes part in a round."""

    per_round: Annotated[int, Field(gt=0)] | None = None
    """Clients asked in a round, as the sampler draws them; all of them when it is not given."""
    sampler: Choice = Choice("uniform", {})
    """Who is asked, see [Sampling](#sampling)."""
    pace: Choice | None = None
    """A server that does not wait for all, see [Asynchronous rounds](#asynchronous-rounds); then `per_round` clients
    are at work at any time."""
    devices: dict[str, DeviceProfile] = {}
    """Client name or pattern -> its device; `default`: the others; of several patterns the last."""
    ranks: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Client name or pattern -> ranks of a low-rank adapter that it trains; `default`: the others. The scale stays."""


class Dp(_Values):
    """Differential privacy of the training records inside each client, by DP-SGD."""

    clip: Annotated[float, Field(gt=0)]
    """Largest norm of one unit's gradient, over all trained tensors together."""
    noise: Annotated[float, Field(gt=0)]
    """Standard deviation of the noise on the sum of a batch, in multiples of `clip`."""
    unit: Annotated[str, Field(min_length=1)] = "record"
    """What is protected: one record, or all records with the same value of this column, such as patient_id."""


class Local(_Values):
    """Training at a client."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    batch: Annotated[int, Field(gt=0)] = 8
    accumulate: Annotated[int, Field(gt=0)] = 1
    """Micro-batches of `batch` examples that make one optimizer step."""
    epochs: Annotated[int, Field(gt=0)] = 1
    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps a round, in place of epochs."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, over the whole run."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the whole run in which the learning rate rises from zero."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm of a step, per client."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD only."""
    moments: Literal["reset", "keep"] = "reset"
    """Whether a client's optimizer starts each round anew or goes on from its own last round."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    dp: Dp | None = None
    """Clip and noise the gradient of each record. Batches are drawn by chance: `batch` is the size to expect."""

    @model_validator(mode="before")
    @classmethod
    def _one_clip(cls, values: Any) -> Any:
        """Leave the clip of whole steps out where each record is clipped: it would cut the noise and no record."""
        if isinstance(values, Mapping) and values.get("dp") is not None:
            if values.get("clip") is not None:
                raise KeyProblem(("local", "clip"), "dp has a clip of its own, for each record; leave this one out")
            return {**values, "clip": None}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "Local":
        if "steps" in self.model_fields_set and self.steps and "epochs" in self.model_fields_set and self.epochs != 1:
            raise ValueError("give epochs or steps, not both")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum is a key of sgd; adamw has moments of its own")
        return self


class Privacy(_Values):
    """How privacy is accounted for, where local.dp or the pipeline adds noise."""

    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Must be smaller than one over the number of units that any client has."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Budget: a job that would spend more is refused, and a run stops before the round that would."""


class Failures(_Values):
    """What happens when a client gives no update that can be counted."""

    on_client_failure: Literal["abort", "drop", "retry"] = "abort"
    """End the run; go on without the client in this round; or ask it again, and then go on without it."""
    retries: Annotated[int, Field(gt=0)] = 2
    """How often a client is asked again within a round."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The part of a round's clients that must be counted; with fewer the run stops and can be resumed."""
    on_nan: Literal["abort", "drop"] = "abort"
    """The same for a NaN or an infinity at a client, which asking again would bring back."""
    deadline: Annotated[float, Field(gt=0)] | None = None
    """Seconds that real sites have for a round; later is lost. Simulated clients are never late."""


class Member(_Values):
    """A real site that takes part, by its name."""

    key: Annotated[str, Field(min_length=1)]
    """Its public key, which `weft keys new` printed."""


class Budget(_Values):
    """What a run may spend; it ends with results where the next round would not fit."""

    megabytes: Annotated[float, Field(gt=0)] | None = None
    """Of all messages of all rounds, both ways, 10^6 bytes each."""


class Evaluate(_Values):
    """Evaluation on the test records."""

    every: Annotated[int, Field(ge=0)] = 1
    """Rounds between evaluations of the loss; 0: only before the first and after the last."""
    on: Annotated[tuple[str, ...], _LIST] | None = None
    """Metrics of the final tables; all that the task has when not given."""
    examples: Annotated[int, Field(gt=0)] | None = None
    """Most test examples of a group that text is generated for."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    batch: Annotated[int, Field(gt=0)] = 32
    per_example: bool = False
    """Keep the scores of each test example after the last round, in `scores/`: what paired comparisons are made of."""


def _with_plugins(values: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve the plug-ins that a job names, so that the fields hold checked choices."""
    job = {"algorithm": "fedavg", "pipeline": ["weigh"], "downlink": [], **values}
    for kind in ("adapter", "task", "algorithm"):
        if kind in job:
            job[kind] = plugins.parse(kind, job[kind], (kind,))
    clients = job.get("clients")
    if isinstance(clients, Mapping):
        named = {kind: clients[kind] for kind in ("sampler", "pace") if clients.get(kind) is not None}
        chosen = {kind: plugins.parse(kind, value, ("clients", kind)) for kind, value in named.items()}
        job["clients"] = {**clients, **chosen}
    data = job.get("data")
    if isinstance(data, Mapping) and data.get("split") is not None:
        job["data"] = {**data, "split": plugins.parse("split", data["split"], ("data", "split"))}
    for key in ("pipeline", "downlink"):
        steps = job[key]
        if not isinstance(steps, list | tuple):
            raise KeyProblem((key,), "must be a list of transforms")
        job[key] = tuple(plugins.parse("transform", step, (key, i)) for i, step in enumerate(steps))
    return job


class Job(_Values):
    """One federated fine-tuning, complete: a job and a seed decide every number of the result."""

    model: Model
    adapter: Choice
    task: Choice
    data: Data
    clients: Clients = Clients()
    local: Local = Local()
    privacy: Privacy = Privacy()
    algorithm: Choice
    pipeline: tuple[Choice, ...]
    """Steps between a client's update and the server, in the client's order."""
    downlink: tuple[Choice, ...] = ()
    """Steps of what the server sends to the clients: quantize, lowrank, zstd."""
    budget: Budget = Budget()
    failures: Failures = Failures()
    rounds: Annotated[int, Field(gt=0)] = 10
    evaluate: Evaluate = Evaluate()
    baselines: Annotated[tuple[Literal["untrained", "local", "centralized"], ...], _LIST] = ("untrained",)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    sites: dict[str, Member] = {}
    """The real sites, a closed list: name -> public key. A simulation checks it and uses nothing of it."""
    folder: Annotated[Path, Field(exclude=True, strict=False)] = Path(".")
    """Relative paths in the job start here: the folder of the job file."""
    _source: Source = PrivateAttr(default_factory=lambda: Source())

    def __init__(self, /, **values: Any) -> None:
        checked = _with_plugins(values)
        try:
            super().__init__(**checked)
        except ValidationError as error:
            raise plugins.problem(error, Job, checked, ()) from None
        _check_sites(self)

    @contextmanager
    def located(self) -> Iterator[None]:
        """Add file and line to errors that are raised inside and begin with a key of the job."""
        try:
            yield
        except JobError as error:
            located = self._source.locate(error)
            if located is error:
                raise
            raise located from error

    def resolved(self) -> dict[str, Any]:
        """Return the job with every default written out, ready for YAML or JSON."""
        dumped = self.model_dump(mode="json")
        for key in ("adapter", "task", "algorithm"):
            dumped[key] = getattr(self, key).to_job()
        for key in ("pipeline", "downlink"):
            dumped[key] = [step.to_job() for step in getattr(self, key)]
        dumped["data"]["split"] = self.data.split and self.data.split.to_job()
        dumped["clients"]["sampler"] = self.clients.sampler.to_job()
        dumped["clients"]["pace"] = self.clients.pace.to_job() if self.clients.pace else None
        return dumped

    def hash(self) -> str:
        """Return the SHA-256 of the resolved job."""
        text = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check_sites(job: Job) -> None:
    """Refuse a list of sites that is not one name and one key each, and a simulation without records."""
    owners: dict[str, str] = {}
    for name, site in job.sites.items():
        if not _NAME.fullmatch(name):
            raise KeyProblem(("sites", name), "a name has up to 64 letters A-Z, digits, `.`, `_` or `-`, and no path")
        from weft import identity  # here, since only a job with sites needs cryptography

        try:
            identity.parse(site.key)
        except JobError as error:
            raise KeyProblem(("sites", name, "key"), str(error)) from None
        if site.key in owners:
            raise KeyProblem(("sites", name, "key"), f"is the key of {owners[site.key]} as well; each has its own")
        owners[site.key] = name
    for key in () if job.sites else ("train", "split"):
        if getattr(job.data, key) is None:
            raise KeyProblem(("data", key), "is missing")


def load(path: Path | str, overrides: Sequence[str] = ()) -> Job:
    """Read and check a job file; `overrides` are `key.key=value` as on the command line.

    Raise JobError with file, line and key for the first thing that is wrong.
    """
    path = Path(path)
    values, lines = read_values(path)
    changed = tuple(override_key(values, override) for override in overrides)
    source = Source(path.name, lines, changed)
    try:
        if "folder" in values:
            raise KeyProblem(("folder",), "unknown key; paths count from the job file's folder")
        job = Job(**values, folder=path.parent)
    except KeyProblem as problem:
        raise source.locate(problem) from None
    job._source = source
    return job


def read_values(
    path: Path, what: str = "job", such: str = "model, adapter, task and data"
) -> tuple[dict[str, Any], Mapping[yaml12.Path, int]]:
    """Return what a job file holds, unchecked, and the line of every key."""
    values, lines = yaml12.read(_read(path, what), path.name)
    if not isinstance(values, dict):
        raise JobError(f"{path.name}: a {what} is a mapping of keys such as {such}; this is not")
    return values, lines


def _read(path: Path, what: str) -> str:
    try:
        if path.is_dir():
            raise JobError(f"{path} is a folder; name the {what} file in it")
        if not path.exists():
            others = [other.name for other in path.parent.glob("*.y*ml")]
            raise JobError(f"there is no {what} file {path}{near(path.name, others) or '; check its name and folder'}")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise JobError(
            f"the {what} file {path} cannot be read: {error.strerror}; check its name and permissions"
        ) from None
    if len(content) > MOST_BYTES:
        raise JobError(f"{path.name}: a {what} file has at most {MOST_BYTES:,} bytes; this is something else")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JobError(f"{path.name}, line {line}: this is not UTF-8 text; save the file as UTF-8") from None


def override_key(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Apply one `key.key=value` in place and return its path."""
    key, equals, text = override.partition("=")
    steps = tuple(key.split("."))
    if not equals or not all(steps):
        raise JobError(f"--set {override}: write key=value, such as local.lr=1e-3")
    value, _ = yaml12.read(text, f"--set {override}")
    put(values, steps, value, f"--set {override}")
    return steps


def put(values: dict[str, Any], steps: Sequence[str], value: Any, source: str) -> None:
    """Give a key of a job, as it was read, another value in place; sections that are missing are made."""
    place = values
    for step in steps[:-1]:
        if isinstance(place.get(step), str) and step in ("adapter", "task", "algorithm", "split", "sampler", "pace"):
            place[step] = {place[step]: None}
        if place.get(step) is None:
            place[step] = {}
        place = place[step]
        if not isinstance(place, dict):
            raise JobError(f"{source}: `{step}` holds no keys in this job")
    place[steps[-1]] = value
