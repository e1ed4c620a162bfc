"""What secure aggregation is not defined for: a job is refused before any client starts, with the reason."""

from weft.core.errors import KeyProblem
from weft.core.meeting import threshold
from weft.core.ring import code
from weft.core.types import Algorithm, Facts, Wire
from weft.secure.setting import LEAST

FIELD = 2**31
FINEST = 4.0
"""The least standard deviation of a share of noise, in units of the ring. A sum of n discrete Gaussians is none itself:
accounted as one, it costs tau d / 2 more in eps^2, tau = 10 sum_{k<n} exp(-2 pi^2 s^2 k / (k + 1)) (Kairouz, Liu,
Steinke 2021, theorem 1). From s = 4 on tau < n 3e-68: no digit of any epsilon."""
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
    if wire.noise:
        _refuse_coarse(wire, facts.per_round)
    if wire.hidden and facts.per_round < LEAST:
        raise KeyProblem(
            ("pipeline",),
            f"mask: a sum of {facts.per_round} gives a client's update away to the others; let {LEAST} clients or more "
            "take part in a round",
        )


def _refuse_coarse(wire: Wire, clients: int) -> None:
    known = code(wire, clients)
    share = wire.noise * known.norm * known.unit / (threshold(clients) - wire.colluders) ** 0.5
    if share < FINEST:
        raise KeyProblem(
            ("pipeline",),
            f"discrete_noise: a client's share has a standard deviation of {share:.2g} units of the ring, and below "
            f"{FINEST:g} a sum of shares has no known epsilon; raise the multiplier",
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
