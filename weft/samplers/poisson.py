"""poisson: each client for itself, with the chance per_round / clients; so the size of a cohort is random.

The sampling that the privacy of subsampled noise is usually accounted for. A round that draws nobody changes nothing,
and its line in the journal says so. The draw comes from the job's public seed, like every draw of a simulation: who
is to profit from not knowing the cohort must not know the seed.
"""

import torch

from weft.core import keys
from weft.core.sampling import Pool, Sampler


def poisson() -> Sampler:
    """Draw every client independently, `clients.per_round` of them on average."""

    def draw(pool: Pool) -> list[str]:
        draws = torch.rand(
            len(pool.names), generator=keys.generator(pool.seed, pool.round, "poisson"), dtype=torch.float64
        )
        chosen = (draws < pool.count / len(pool.names)).tolist()
        return [name for name, is_in in zip(pool.names, chosen, strict=True) if is_in]

    return Sampler(draw, even=True, fixed=False)
