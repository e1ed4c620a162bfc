"""uniform: `clients.per_round` clients, drawn uniformly without replacement; what a job without a sampler has."""

from weft.core.sampling import UNIFORM, Sampler


def uniform() -> Sampler:
    """Draw a fixed number of clients, each set of them with the same chance."""
    return UNIFORM
