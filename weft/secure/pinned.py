"""Who takes part in secure aggregation, as the job pins it: each client and the server know it for themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weft.core.sampling import drawn
from weft.identity import Identity
from weft.secure.coordinator import Coordinator
from weft.secure.ledger import Ledger
from weft.secure.member import Member


@dataclass(frozen=True)
class Pinned:
    """The clients of a job with their public identities, and how each round's cohort is drawn from them."""

    job: str
    """The job's hash."""
    peers: Mapping[str, str]
    """Client -> public identity, in the order in which cohorts are drawn from."""
    per_round: int
    seed: int

    def cohort(self, number: int) -> tuple[str, ...]:
        """Return who is drawn for a round, in name order."""
        return drawn(tuple(self.peers), self.per_round, self.seed, number)

    def member(self, name: str, own: Identity, folder: Path | None = None) -> Member:
        """Return a client's half, with its ledger under `folder`, or in memory alone."""
        ledger = Ledger(folder / name / "opened.jsonl" if folder else None)
        return Member(name, own, self.job, self.peers, self.cohort, ledger)

    def coordinator(self) -> Coordinator:
        """Return the server's half."""
        return Coordinator(self.job, self.peers)
