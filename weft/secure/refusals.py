"""What secure aggregation is not defined for: a job is refused before any client starts, with the reason."""

from weft.core.errors import KeyProblem
from weft.core.meeting import threshold
from weft.core.types import Algorithm, Facts, Wire
from weft.secure.setting import LEAST

FIELD = 2**31
AFTER = ("ring", "discrete_noise", "mask")
"""Steps that leave integers of a ring."""


def refuse(wire: Wire, facts: Facts, algorithm: Algorithm) -> None:
    """Raise KeyProblem for a job whose updates travel in a ring and that would be wrong, or would not be hidden."""
    if not wire.ring:
        return
    _refuse_steps(wire, facts)
    if not algorithm.sends:
        raise KeyProblem(
            ("algorithm",), "its clients send nothing, so there is nothing to hide; leave ring and mask out"
        )
    if algorithm.combine is not None:
        raise KeyProblem(
            ("algorithm",),
            "it needs every client's own update, and a ring holds their sum only; choose an algorithm that steps with "
            "the mean, such as fedavg or ffa_lora, or leave ring and mask out",
        )
    if facts.mixed_ranks:
        raise KeyProblem(
            ("clients", "ranks"), "ranks that only some clients train would be seen in the sum; give all the same rank"
        )
    if facts.per_round * (wire.heaviest or 1) >= FIELD:
        raise KeyProblem(("pipeline",), f"the weights of {facts.per_round} clients do not fit; lower weigh.cap")
    if wire.noise and 4 * (threshold(facts.per_round) - wire.colluders) < facts.per_round:
        raise KeyProblem(
            ("pipeline",),
            f"discrete_noise: {threshold(facts.per_round)} of {facts.per_round} clients stay to the end, and without "
            f"{wire.colluders} colluders too few are left to share the noise; lower colluders",
        )
    if wire.hidden and facts.per_round < LEAST:
        raise KeyProblem(
            ("pipeline",),
            f"mask: a sum of {facts.per_round} gives a client's update away to the others; let {LEAST} clients or more "
            "take part in a round",
        )


def _refuse_steps(wire: Wire, facts: Facts) -> None:
    if "noise" in facts.pipeline:
        raise KeyProblem(
            ("pipeline",),
            "noise is added by the server to a plain sum; in a ring each client adds its share, by discrete_noise",
        )
    if wire.encoded not in AFTER:
        raise KeyProblem(
            ("pipeline",),
            f"{wire.encoded} makes codes of what ring left, which no longer add up; leave it out",
        )
    if wire.noise and not wire.hidden:
        raise KeyProblem(
            ("pipeline",),
            "each client adds only its share of the noise, which protects the sum and not the client; put mask last",
        )
