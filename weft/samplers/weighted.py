"""weighted: clients with more records are asked more often; those that are asked count alike, so the mean is unbiased.

Client k is in a cohort of K with the chance K p_k, p_k its part of all records, by one systematic draw along the
clients in random order (Madow 1949): E[1/K sum_{k in S} w_k] = sum_k p_k w_k. Counting by examples as well would count
size twice, so the pipeline must weigh uniformly; and a chance is at most 1, so no client may hold more than 1/K of all
records. Both are refused, not corrected.
"""

import math
from collections.abc import Mapping

import torch

from weft.core import keys
from weft.core.errors import JobError
from weft.core.sampling import Member, Pool, Sampler
from weft.core.types import Facts


def weighted() -> Sampler:
    """Draw clients with chances in proportion to their records."""
    return Sampler(_draw, check=_check, informed=True)


def _draw(pool: Pool) -> list[str]:
    order = pool.shuffled("cohort")
    total = sum(pool.member(name).examples for name in order)
    point = float(torch.rand(1, generator=keys.generator(pool.seed, pool.round, "systematic"), dtype=torch.float64))
    chosen, reached = [], 0
    for name in order:  # those in whose stretch of the line a point of 0 + u, 1 + u, 2 + u, ... lies
        before, reached = reached * pool.count / total, reached + pool.member(name).examples
        if _points(reached * pool.count / total, point) > _points(before, point):
            chosen.append(name)
    return chosen


def _points(place: float, first: float) -> int:
    """Return how many of first, first + 1, first + 2, ... lie before a place."""
    return max(0, math.ceil(place - first))


def _check(facts: Facts, members: Mapping[str, Member]) -> None:
    if not facts.uniform:
        raise JobError(
            "weighted asks large clients more often, and weigh by examples would count their size once more: set "
            "pipeline to [weigh: {by: uniform}]"
        )
    total = sum(member.examples for member in members.values())
    for name, member in members.items():
        if member.examples * facts.per_round > total:
            raise JobError(
                f"weighted would have to ask {name} more than once a round: it has {member.examples} of {total} "
                f"records, more than 1/{facts.per_round}; lower clients.per_round, or choose uniform"
            )
