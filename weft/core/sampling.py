"""Who is asked in a round: what is known of the clients beforehand, and what a sampler may learn of their replies."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weft.core import keys
from weft.core.types import Facts, Metrics, Tensors


@dataclass(frozen=True)
class Device:
    """The machine of a simulated client, by which a clock tells when it is done."""

    seconds_per_step: float = 1.0
    bandwidth: float | None = None
    """Bytes a second, each way; None: traffic takes no time."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of the time that a round takes."""

    def seconds(self, steps: int, size: int) -> float:
        """Return the usual time for some optimizer steps and `size` bytes down and up together."""
        return steps * self.seconds_per_step + (size / self.bandwidth if self.bandwidth else 0.0)

    def drawn(self, seconds: float, seed: int, *address: str | int) -> float:
        """Return a time with its jitter, drawn at an address."""
        if not self.jitter:
            return seconds
        return seconds * math.exp(self.jitter * float(keys.normal((1,), seed, *address, "seconds")))


@dataclass(frozen=True)
class Member:
    """What the server knows of a client before it asks."""

    examples: int = 1
    steps: int = 1
    """Optimizer steps of a round."""
    device: Device = field(default_factory=Device)


@dataclass(frozen=True)
class Pool:
    """Whom a sampler draws from, in one round."""

    names: tuple[str, ...]
    count: int
    """Clients that the job asks for a round: `clients.per_round`, or all."""
    seed: int
    round: int
    members: Mapping[str, Member] = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    """What the sampler kept of the rounds before; empty before the first."""
    size: int = 0
    """Bytes that go down to a client and up from it in a round."""

    def member(self, name: str) -> Member:
        """Return what is known of a client."""
        return self.members.get(name, Member())

    def shuffled(self, what: str) -> list[str]:
        """Return all names in an order drawn for this round."""
        return [self.names[i] for i in keys.permutation(len(self.names), self.seed, self.round, what)]


def drawn(clients: Sequence[str], per_round: int, seed: int, number: int) -> tuple[str, ...]:
    """Return the uniform cohort of a round, in name order, which everyone who has the job can draw."""
    order = keys.permutation(len(clients), seed, number, "cohort")
    return tuple(sorted(clients[i] for i in order[:per_round]))


def evenly(pool: Pool) -> tuple[str, ...]:
    """Draw uniformly without replacement."""
    return drawn(pool.names, pool.count, pool.seed, pool.round)


def without_replacement(scores: Mapping[str, float], count: int, seed: int, *address: str | int) -> list[str]:
    """Draw names one after the other, each with a chance in proportion to its score, positive, among those left.

    The smallest of exponential draws divided by the scores are such a sample (Efraimidis and Spirakis 2006).
    """
    draws = torch.rand(len(scores), generator=keys.generator(seed, *address), dtype=torch.float64)
    times = {name: -math.log1p(-float(u)) / score for (name, score), u in zip(scores.items(), draws, strict=True)}
    return sorted(times, key=times.__getitem__)[:count]


def learn_nothing(pool: Pool, replies: Mapping[str, Metrics]) -> Tensors:
    """Keep nothing."""
    return {}


@dataclass(frozen=True)
class Sampler:
    """Who is asked in a round, as a pure function of the seed, the round and what the rounds before told."""

    draw: Callable[[Pool], Collection[str]] = evenly
    """Names, each at most once; none is a round that changes nothing."""
    learn: Callable[[Pool, Mapping[str, Metrics]], Tensors] = learn_nothing
    """(pool, metrics of the clients that were counted) -> the next memory, part of every checkpoint."""
    check: Callable[[Facts, Mapping[str, Member]], None] = lambda facts, members: None
    """Raise JobError for a job that the sampler is not defined for, with the reason."""
    even: bool = False
    """Every client is asked equally often, whatever its size, speed and losses."""
    fixed: bool = True
    """Every round asks as many clients as the job says."""
    informed: bool = False
    """Draws by the records or the devices of clients, which only a simulation knows beforehand."""
    open: Callable[[Path], "Sampler"] | None = None
    """(folder of the job) -> the sampler with the files read that it names."""

    @property
    def learns(self) -> bool:
        """Tell whether cohorts depend on what clients told in earlier rounds."""
        return self.learn is not learn_nothing


UNIFORM = Sampler(even=True)
