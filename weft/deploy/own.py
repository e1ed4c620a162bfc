"""What a site brings to a run: its name, records, model, key and limits, all of it its own choice."""

from dataclasses import dataclass, field
from pathlib import Path

from weft.deploy.policy import Policy
from weft.identity import Identity


@dataclass(frozen=True)
class Own:
    """A site's own things, none of them the coordinator's choice."""

    name: str
    train: Path
    test: Path | None
    model: str
    identity: Identity
    folder: Path
    """Memories, the accepted job and the adapter."""
    policy: Policy = field(default_factory=Policy)
    accept: str | None = None
    """Beginning of the hash of the job that is accepted without a question."""

    @property
    def ledger(self) -> Path:
        """Return where this site writes what it has told of its records."""
        return self.folder / "privacy.jsonl"
