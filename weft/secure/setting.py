"""What both sides know of a round before any message: it comes from the job, so that no server can change it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from weft.core import trees
from weft.core.errors import PolicyError
from weft.core.meeting import threshold
from weft.core.types import State
from weft.secure.digests import digest

LEAST = 3  # clients: with two, the sum would give each the other's update


def colluders(clients: int) -> int:
    """Return how many clients may collude with a lying server: 2 t - n - 1.

    >>> [colluders(n) for n in (3, 4, 5, 10, 100)]
    [2, 1, 2, 3, 33]
    """
    return 2 * threshold(clients) - clients - 1


@dataclass(frozen=True)
class Setting:
    """One round: the job, its number, who was drawn, and their pinned keys; raise PolicyError for what cannot be."""

    job: str
    number: int
    cohort: tuple[str, ...]
    """In name order; a client's place is its index here."""
    peers: Mapping[str, str]
    """Client -> its public identity, for all clients of the job."""

    def __post_init__(self) -> None:
        keys = [self.peers.get(name, "") for name in self.cohort]
        if len(self.cohort) < LEAST:
            raise PolicyError(f"round {self.number}: {len(self.cohort)} clients are too few; the least is {LEAST}")
        if list(self.cohort) != sorted(set(self.cohort)) or len(set(keys)) < len(keys) or not all(keys):
            raise PolicyError(f"round {self.number}: the cohort names a client twice, or one without a key of its own")

    @property
    def threshold(self) -> int:
        """Return how many clients must stay to the end."""
        return threshold(len(self.cohort))

    @cached_property
    def context(self) -> bytes:
        """Return what every signature before the key list is bound to."""
        pinned = [text.encode() for name in self.cohort for text in (name, self.peers[name])]
        return digest(b"round", self.job.encode(), self.number.to_bytes(4), *pinned)

    def names(self, places: Sequence[int]) -> tuple[str, ...]:
        """Return the names at some places."""
        return tuple(self.cohort[place] for place in places)


def fingerprint(state: State) -> bytes:
    """Return SHA-256 over what a client received: names, shapes, types and every bit."""
    parts = []
    for name, tensor in trees.flatten(state).items():
        numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), numbers.numpy().tobytes()]
    return digest(b"received", *parts)
