"""round_robin: clients take turns in one order, drawn at the start, so each is asked as often as any other.

Round t asks the places (t - 1) K to t K - 1 of the order, which begins again at its end.
"""

from weft.core import keys
from weft.core.sampling import Pool, Sampler


def round_robin() -> Sampler:
    """Ask the clients in turn."""

    def draw(pool: Pool) -> list[str]:
        order = keys.permutation(len(pool.names), pool.seed, "round robin")
        first = (pool.round - 1) * pool.count
        return [pool.names[order[(first + i) % len(order)]] for i in range(pool.count)]

    return Sampler(draw, even=True)
