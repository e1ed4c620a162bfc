"""What every sampler must pass, on nine clients of unlike sizes and devices."""

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from weft.core.sampling import Device, Member, Pool, Sampler
from weft.testing.sound import bits, require, require_float32, run_all, running

MakeSampler = Callable[[], Sampler]
NAMES = tuple(f"c{i}" for i in range(9))
MEMBERS = {name: Member(5 + i % 4, 2 + i, Device(1.0 + i % 3, 1e6)) for i, name in enumerate(NAMES)}
COUNT, ROUNDS = 3, 300


def _pools(sampler: Sampler, rounds: int, seed: int = 7) -> list[Pool]:
    """Return the pools of some rounds in which every client that is asked replies."""
    pools = [Pool(NAMES, COUNT, seed, 1, MEMBERS, {}, 800)]
    for number in range(2, rounds + 2):
        before = pools[-1]
        with running("the sampler fails"):
            asked = sampler.draw(before)
            replies = {name: {"loss": 1.0 + NAMES.index(name) / 10} for name in sorted(asked)}
            memory = sampler.learn(before, replies)
        pools.append(Pool(NAMES, COUNT, seed, number, MEMBERS, memory, 800))
    return pools[:rounds]


def _cohorts(make: MakeSampler, rounds: int, seed: int = 7) -> list[tuple[str, ...]]:
    sampler = opened(make)
    return [tuple(sorted(sampler.draw(pool))) for pool in _pools(sampler, rounds, seed)]


def opened(make: MakeSampler) -> Sampler:
    """Return a sampler with its files read, from the current folder."""
    sampler = make()
    return sampler.open(Path()) if sampler.open else sampler


def check_cohorts(make: MakeSampler) -> None:
    """Draw clients that exist, each once; as many as asked for, if the sampler says that its cohorts are fixed."""
    for cohort in _cohorts(make, 40):
        require(len(set(cohort)) == len(cohort), f"a client is drawn twice: {cohort}")
        require(set(cohort) <= set(NAMES), f"a stranger is drawn: {cohort}")
        require(not make().fixed or len(cohort) == COUNT, f"{len(cohort)} clients are drawn, not the {COUNT} asked for")


def check_sampler_draws(make: MakeSampler) -> None:
    """Draw from addresses only: the same pool gives the same cohort, the global generator is not touched."""
    found = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = bits(torch.get_rng_state())
            found.append(_cohorts(make, 20))
            require(bits(torch.get_rng_state()) == state, "the sampler draws from torch's global generator")
    require(found[0] == found[1], "the sampler gives another cohort when it is asked again")


def check_sampler_memory(make: MakeSampler) -> None:
    """Keep float32 tensors, and leave what is given as it was."""
    sampler = opened(make)
    pool = _pools(sampler, 5)[-1]
    before = bits(pool.memory)
    memory = sampler.learn(pool, {name: {"loss": 2.0} for name in sampler.draw(pool)})
    require(bits(pool.memory) == before, "`learn` changes the memory that it is given; make new tensors instead")
    require_float32("the memory", {"memory": memory})


def check_even(make: MakeSampler) -> None:
    """Ask every client equally often, if the sampler says so; 5 standard deviations of a binomial are allowed."""
    if not make().even:
        return
    seen = Counter(name for cohort in _cohorts(make, ROUNDS) for name in cohort)
    usual, part = ROUNDS * COUNT / len(NAMES), COUNT / len(NAMES)
    allowed = 5 * (ROUNDS * part * (1 - part)) ** 0.5
    for name in NAMES:
        require(abs(seen[name] - usual) <= allowed, f"{name} is asked {seen[name]} times, not about {usual:.0f}")


SAMPLER = (check_cohorts, check_sampler_draws, check_sampler_memory, check_even)


def check_sampler(make: MakeSampler, waive: Collection[str] = ()) -> None:
    """Run all checks of a sampler."""
    run_all(SAMPLER, waive, make)
