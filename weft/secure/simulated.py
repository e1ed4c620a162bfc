"""Secure aggregation in one process: every key, message and check of real sites, between clients that are simulated.

It shows that the protocol gives the right sum and what it costs. It hides nothing from whoever runs the process, and
says so: `simulated` stands in the results. The identities are drawn anew for each process; no result depends on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weft import identity
from weft.core.sampling import drawn
from weft.secure.coordinator import Coordinator
from weft.secure.ledger import Ledger
from weft.secure.member import Member


@dataclass(frozen=True)
class Simulated:
    """The clients of a job with their identities, and the server that knows their public halves."""

    job: str
    per_round: int
    seed: int
    identities: Mapping[str, identity.Identity]

    @property
    def peers(self) -> dict[str, str]:
        """Return client -> public identity."""
        return {name: known.public for name, known in self.identities.items()}

    def members(self, folder: Path | None = None) -> dict[str, Member]:
        """Return each client's half, with its ledger under `folder`, or in memory alone."""
        peers = self.peers
        cohort = partial(drawn, tuple(peers), self.per_round, self.seed)

        def ledger(name: str) -> Ledger:
            return Ledger(folder / name / "opened.jsonl" if folder else None)

        return {
            name: Member(name, known, self.job, peers, cohort, ledger(name)) for name, known in self.identities.items()
        }

    def coordinator(self) -> Coordinator:
        """Return the server's half."""
        return Coordinator(self.job, self.peers)


def simulate(job: str, clients: tuple[str, ...], per_round: int, seed: int) -> Simulated:
    """Draw an identity for each client of a job; `clients` in the order in which cohorts are drawn from."""
    return Simulated(job, per_round, seed, {name: identity.new() for name in clients})
