"""utility: ask those whose records taught most last time and whose devices are fast, and try the others now and then.

The score of a client that was asked before: examples x loss, its last mean training loss, cut at the quantile `clip`
of all; + sqrt(0.1 log t / its last round), relative to the largest, so that nobody is forgotten; x (T / seconds)^slow
where its device takes longer than T, the quantile `fast` of all devices' times. The exploiting part of a cohort is
drawn in proportion to the scores among those that reach 0.95 of the score of the last that would fit; the exploring
part, `explore` at first, x 0.98 a round down to 0.2, among those never asked, in proportion to their speed. After Lai
et al. 2021 (Oort), arXiv:2010.06081, without its pacer and its blacklist; the mean loss stands for the root of the mean
square. The server must see each client's loss, and drawing by it is no sampling that a privacy account covers: both
are refused. The mean over such cohorts leans to clients with large losses.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.core.sampling import Pool, Sampler, without_replacement
from weft.core.types import Metrics, Tensors

Part = Annotated[float, Field(ge=0, le=1)]
DECAY, LEAST, CUT = 0.98, 0.2, 0.95


def utility(
    explore: Part = 0.9, slow: Annotated[float, Field(ge=0)] = 2.0, fast: Part = 0.5, clip: Part = 0.95
) -> Sampler:
    """Draw by what clients last learned and by how fast they are.

    explore: the part of the first cohort that is taken from clients never asked. slow: how hard slow devices are
    put back; 0: not at all. fast: the quantile of times that is fast enough. clip: the quantile that losses are cut at.
    """

    def draw(pool: Pool) -> list[str]:
        last = pool.memory.get("last", torch.zeros(len(pool.names)))
        new = [name for name, round_ in zip(pool.names, last.tolist(), strict=True) if not round_]
        seconds = {name: _seconds(pool, name) for name in pool.names}
        known = scored(pool, last, seconds)
        exploring = max(LEAST, explore * DECAY ** (pool.round - 1)) if explore else 0.0
        wanted = max(min(len(new), math.ceil(pool.count * exploring - 1e-9)), pool.count - len(known))
        tried = without_replacement({name: 1 / seconds[name] for name in new}, wanted, pool.seed, pool.round, "explore")
        return [*tried, *_best(known, pool.count - len(tried), pool)]

    def scored(pool: Pool, last: Tensor, seconds: Mapping[str, float]) -> dict[str, float]:
        seen = [i for i, round_ in enumerate(last.tolist()) if round_]
        if not seen:
            return {}
        raw = pool.memory["loss"].double()[seen] * torch.tensor([pool.member(pool.names[i]).examples for i in seen])
        raw = raw.clamp(min=1e-12, max=float(raw.quantile(clip)) or 1e-12)
        stale = (0.1 * math.log(max(pool.round, 2)) / last.double()[seen]).sqrt()
        enough = float(torch.tensor(list(seconds.values()), dtype=torch.float64).quantile(fast))
        scores = {}
        for i, value in zip(seen, (raw / raw.max() + stale).tolist(), strict=True):
            name = pool.names[i]
            scores[name] = value * min(1.0, enough / seconds[name]) ** slow
        return scores

    return Sampler(draw, _learn, informed=True)


def _seconds(pool: Pool, name: str) -> float:
    member = pool.member(name)
    return max(member.device.seconds(member.steps, pool.size), 1e-9)


def _best(scores: Mapping[str, float], count: int, pool: Pool) -> Sequence[str]:
    if count <= 0:
        return []
    ranked = sorted(scores.values(), reverse=True)
    bar = CUT * ranked[min(count, len(ranked)) - 1]
    good = {name: score for name, score in scores.items() if score >= bar}
    return without_replacement(good, count, pool.seed, pool.round, "exploit")


def _learn(pool: Pool, replies: Mapping[str, Metrics]) -> Tensors:
    nothing = torch.zeros(len(pool.names))
    loss, last = (pool.memory.get(part, nothing).clone() for part in ("loss", "last"))
    places = {name: i for i, name in enumerate(pool.names)}
    for name, metrics in replies.items():
        loss[places[name]] = max(metrics.get("loss", 0.0), 0.0)
        last[places[name]] = pool.round
    return {"last": last, "loss": loss}
