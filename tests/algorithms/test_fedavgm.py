"""fedavgm: momentum by hand, against a float64 reference, as fedavg at momentum 0, as d / (1 - beta) in the end."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN
from weft import plugins
from weft.algorithms.fedavg import fedavg
from weft.algorithms.fedavgm import fedavgm
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State
from weft.testing import toys
from weft.testing.sound import bits


def test_two_steps_by_hand() -> None:
    """W = 1, momentum 0.5, lr 2. Mean 3: d = 2, v = 2, w = 1 + 2*2 = 5. Mean 4: d = -1, v = 0.5*2 - 1 = 0, w = 5.
    Mean 6: d = 1, v = 1, w = 7.
    """
    assert reference.steps_of(fedavgm(momentum=0.5, lr=2.0), [3.0, 4.0, 6.0], start=1.0) == [5.0, 5.0, 7.0]


def in_float64(toy: toys.Toy, rounds: int, momentum: float, lr: float) -> dict[str, torch.Tensor]:
    w = reference.wide(toys.adapter())
    v = trees.zeros(w)
    for cohort in reference.cohorts(toy, rounds):
        rows = {name: reference.trained(toy.clients[name], w, toy.lr) for name in cohort}
        average = reference.mean(rows, reference.sizes(toy))
        v = {n: momentum * v[n] + average[n] - w[n] for n in w}
        w = trees.add(w, v, lr)
    return w


def off(make: Callable[[], Algorithm]) -> float:
    toy = toys.toy()
    return reference.far(reference.ended(make, toy), in_float64(toy, 5, 0.7, 0.6))


def test_five_rounds_are_those_of_the_reference() -> None:
    assert off(lambda: fedavgm(momentum=0.7, lr=0.6)) < 1e-5


def test_without_momentum_the_bits_are_those_of_fedavg() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (fedavg, lambda: fedavgm(momentum=0.0)))
    assert bits(one.used) == bits(other.used)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_a_steady_change_ends_in_steps_of_d_over_one_minus_beta(momentum: float) -> None:
    """With the mean always 0.01 ahead of w, v tends to 0.01 / (1 - beta): 0.02 and 0.1."""
    algorithm, state = fedavgm(momentum=momentum, lr=1.0), fedavgm().init(reference.number(0.0))
    for _ in range(150):
        before = state["adapter"]
        state = algorithm.server(state, {"adapter": {"w": before["w"] + 0.01}}, None)  # type: ignore[arg-type]
    step = float((state["adapter"]["w"].double() - before["w"].double()).item())
    assert step == pytest.approx(0.01 / (1 - momentum), rel=1e-3)


def test_its_keys_and_what_it_refuses() -> None:
    with pytest.raises(JobError, match="must be less than 1"):
        plugins.build(plugins.parse("algorithm", {"fedavgm": {"momentum": 1.0}}), "algorithm")
    with pytest.raises(JobError, match="must be more than 0"):
        plugins.build(plugins.parse("algorithm", {"fedavgm": {"lr": 0.0}}), "algorithm")
    with pytest.raises(JobError, match="fedavgm needs one rank"):
        fedavgm().check(replace(FACTS, mixed_ranks=True))
    fedavgm().check(replace(FACTS, optimizer="adamw"))
    assert fedavgm().combine is None


# --- planted mistakes


def with_server(server: Callable[[State, State], State]) -> Algorithm:
    return replace(fedavgm(), server=lambda state, update, tally: server(state, update))


def running_mean() -> Algorithm:
    """M <- beta m + (1 - beta) d."""

    def server(state: State, update: State) -> State:
        d = trees.subtract(update["adapter"], state["adapter"])
        v = {n: 0.7 * state["velocity"][n] + 0.3 * d[n] for n in d}
        return {"adapter": trees.add(state["adapter"], v, 0.6), "velocity": v}

    return with_server(server)


def seeded_with_the_trained() -> Algorithm:
    """Count the first change from what a client trained and not from w: the first momentum is zero."""

    def server(state: State, update: State) -> State:
        fresh = not any(v.any() for v in state["velocity"].values())
        base = update["adapter"] if fresh else state["adapter"]
        v = trees.add(trees.subtract(update["adapter"], base), state["velocity"], 0.7)
        return {"adapter": trees.add(base, v, 0.6), "velocity": v}

    return with_server(server)


def not_taken_along() -> Algorithm:
    """Store the change and not the velocity."""

    def server(state: State, update: State) -> State:
        d = trees.subtract(update["adapter"], state["adapter"])
        v = trees.add(d, state["velocity"], 0.7)
        return {"adapter": trees.add(state["adapter"], v, 0.6), "velocity": d}

    return with_server(server)


def rate_inside() -> Algorithm:
    """V <- lr (beta v + d)."""

    def server(state: State, update: State) -> State:
        d = trees.subtract(update["adapter"], state["adapter"])
        v = {n: 0.6 * (0.7 * state["velocity"][n] + d[n]) for n in d}
        return {"adapter": trees.add(state["adapter"], v), "velocity": v}

    return with_server(server)


@pytest.mark.parametrize("broken", [running_mean, seeded_with_the_trained, not_taken_along, rate_inside])
def test_the_reference_catches(broken: Callable[[], Any]) -> None:
    assert off(broken) > 1e-3
