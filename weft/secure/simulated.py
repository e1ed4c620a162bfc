"""Secure aggregation in one process: every key, message and check of real sites, between clients that are simulated.

It shows that the protocol gives the right sum and what it costs. It hides nothing from whoever runs the process, and
says so: `simulated` stands in the results. The identities are drawn anew for each process; no result depends on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weft import identity
from weft.secure.coordinator import Coordinator
from weft.secure.member import Member
from weft.secure.pinned import Pinned


@dataclass(frozen=True)
class Simulated:
    """The clients of a job with their identities, and the server that knows their public halves."""

    pinned: Pinned
    identities: Mapping[str, identity.Identity]

    @property
    def peers(self) -> Mapping[str, str]:
        """Return client -> public identity."""
        return self.pinned.peers

    def members(self, folder: Path | None = None) -> dict[str, Member]:
        """Return each client's half, with its ledger under `folder`, or in memory alone."""
        return {name: self.pinned.member(name, known, folder) for name, known in self.identities.items()}

    def coordinator(self) -> Coordinator:
        """Return the server's half."""
        return self.pinned.coordinator()


def simulate(job: str, clients: tuple[str, ...], per_round: int, seed: int) -> Simulated:
    """Draw an identity for each client of a job; `clients` in the order in which cohorts are drawn from."""
    identities = {name: identity.new() for name in clients}
    peers = {name: known.public for name, known in identities.items()}
    return Simulated(Pinned(job, peers, per_round, seed), identities)
