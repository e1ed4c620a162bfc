"""What happens when a client gives no update that can be counted: the job's policy, applied to one round."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from weft.core.errors import RunError


@dataclass(frozen=True)
class Policy:
    """What a job wants done about clients that fail, are late, or send what cannot be counted."""

    on_client_failure: Literal["abort", "drop", "retry"] = "abort"
    """End the run, go on without the client in this round, or ask it again and then go on without it."""
    retries: int = 2
    """How often a client is asked again within a round."""
    quorum: float = 0.5
    """The part of a round's clients that must be counted; at least one always."""
    on_nan: Literal["abort", "drop"] = "abort"
    """What a NaN or an infinity in a client's training or update leads to; asking again would bring the same."""
    deadline: float | None = None
    """Seconds that real sites have for a round; a simulated client is never late."""

    def check(self, number: int, asked: int, lost: Mapping[str, str]) -> None:
        """Raise RunError where too few clients of a round are left."""
        needed = max(1, math.ceil(self.quorum * asked - 1e-9))
        if asked - len(lost) < needed:
            named = "; ".join(f"{name}: {reason}" for name, reason in sorted(lost.items())[:5])
            more = f"; and {len(lost) - 5} more" if len(lost) > 5 else ""
            raise RunError(
                f"round {number}: {asked - len(lost)} of {asked} clients can be counted and failures.quorum asks for "
                f"{needed} ({named}{more})"
            )

    def aborts(self, not_finite: bool) -> bool:
        """Tell whether one failure ends the run."""
        return self.on_nan == "abort" if not_finite else self.on_client_failure == "abort"
