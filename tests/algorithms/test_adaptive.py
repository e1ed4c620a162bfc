"""fedadagrad, fedadam, fedyogi: Algorithm 2 of Reddi et al. 2021, by hand and against a float64 reference."""

from collections.abc import Callable
from dataclasses import replace
from math import copysign, sqrt

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN
from weft import plugins
from weft.algorithms.adaptive import adaptive_step
from weft.algorithms.fedadagrad import fedadagrad
from weft.algorithms.fedadam import fedadam
from weft.algorithms.fedavg import fedavg
from weft.algorithms.fedyogi import fedyogi
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Tally, Tensors
from weft.testing import toys

KEYS = {"beta1": 0.6, "beta2": 0.8, "tau": 0.05, "lr": 0.3}
NAMES = ("fedadagrad", "fedadam", "fedyogi")


def made(name: str, **keys: float) -> Algorithm:
    keys = {**KEYS, **keys}
    if name == "fedadagrad":
        keys.pop("beta2")
    made_: Algorithm = plugins.build(plugins.parse("algorithm", {name: keys}), "algorithm")
    return made_


def test_adagrad_by_hand() -> None:
    """W = 0, beta1 0, tau 1, lr 3, v = 1. Mean 1: d = 1, v = 2, w = 3 / (sqrt 2 + 1) = 1.242641.
    Mean 3.242641: d = 2, v = 6, w = 1.242641 + 6 / (sqrt 6 + 1) = 2.982029.
    """
    got = reference.steps_of(fedadagrad(lr=3.0, tau=1.0), [1.0, 3.242641])
    assert got == pytest.approx([3 / (sqrt(2) + 1), 1.242641 + 6 / (sqrt(6) + 1)], abs=1e-5)
    assert got[1] == pytest.approx(2.982029, abs=1e-5)


def test_adam_by_hand() -> None:
    """W = 0, beta1 = beta2 = 0.5, tau 1, lr 1, v = 1. Mean 2: m = 1, v = 0.5 + 2 = 2.5, w = 1 / (sqrt 2.5 + 1)
    = 0.387426. Mean 0.387426: d = 0, m = 0.5, v = 1.25, w = 0.387426 + 0.5 / (sqrt 1.25 + 1) = 0.623494.
    """
    got = reference.steps_of(fedadam(lr=1.0, beta1=0.5, beta2=0.5, tau=1.0), [2.0, 1 / (sqrt(2.5) + 1)])
    assert got == pytest.approx([0.387426, 0.623494], abs=1e-5)


def test_yogi_by_hand() -> None:
    """W = 0, beta1 = 0, beta2 = 0.5, tau 1, lr 1, v = 1. Mean 2: d^2 = 4 > v, v = 1 + 2 = 3, w = 2 / (sqrt 3 + 1)
    = 0.732051. Mean 1.732051: d^2 = 1 < v, v = 3 - 0.5 = 2.5, w = 0.732051 + 1 / (sqrt 2.5 + 1) = 1.119477.
    """
    got = reference.steps_of(fedyogi(lr=1.0, beta1=0.0, beta2=0.5, tau=1.0), [2.0, 1.7320508])
    assert got == pytest.approx([0.732051, 1.119477], abs=1e-5)


def square_of(name: str, v: float, d: float) -> float:
    if name == "fedadagrad":
        return v + d * d
    if name == "fedadam":
        return 0.8 * v + 0.2 * d * d
    return v - 0.2 * d * d * copysign(1.0, v - d * d)


def in_float64(name: str, toy: toys.Toy, rounds: int) -> Tensors:
    """Step number by number, in Python's floats."""
    w = reference.wide(toys.adapter())
    m = {n: [0.0] * value.numel() for n, value in w.items()}
    v = {n: [KEYS["tau"] ** 2] * value.numel() for n, value in w.items()}
    for cohort in reference.cohorts(toy, rounds):
        rows = {client: reference.trained(toy.clients[client], w, toy.lr) for client in cohort}
        d = trees.subtract(reference.mean(rows, reference.sizes(toy)), w)
        after = {}
        for n, value in w.items():
            numbers = value.flatten().tolist()
            for i, change in enumerate(d[n].flatten().tolist()):
                m[n][i] = KEYS["beta1"] * m[n][i] + (1 - KEYS["beta1"]) * change
                v[n][i] = square_of(name, v[n][i], change)
                numbers[i] += KEYS["lr"] * m[n][i] / (sqrt(v[n][i]) + KEYS["tau"])
            after[n] = torch.tensor(numbers, dtype=torch.float64).view(value.shape)
        w = after
    return w


def off(name: str, make: Callable[[], Algorithm]) -> float:
    toy = toys.toy()
    return reference.far(reference.ended(make, toy), in_float64(name, toy, 5))


@pytest.mark.parametrize("name", NAMES)
def test_five_rounds_are_those_of_the_reference(name: str) -> None:
    assert off(name, lambda: made(name)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_very_large_tau_gives_server_sgd(name: str) -> None:
    """sqrt(v) is tau in the first rounds, so lr = 2 tau and beta1 = 0 take the whole mean update: fedavg."""
    toy = toys.toy()
    got = reference.ended(lambda: made(name, tau=1e4, lr=2e4, beta1=0.0, **_no_decay(name)), toy, 3)
    assert reference.far(got, reference.wide(reference.ended(fedavg, toy, 3))) < 1e-4


def _no_decay(name: str) -> dict[str, float]:
    return {} if name == "fedadagrad" else {"beta2": 0.999999}


def test_yogi_keeps_the_mean_square_positive() -> None:
    algorithm = fedyogi(beta2=0.0, tau=1e-3)
    state = algorithm.init(reference.number(0.0))
    draw = torch.Generator().manual_seed(0)
    for i in range(200):
        size = 10.0 ** float(torch.randint(-4, 2, (), generator=draw))
        mean = {"w": state["adapter"]["w"] + size * torch.randn(1, generator=draw)}
        state = algorithm.server(state, {"adapter": mean}, Tally(i, {"a": 1}, {"a": 1}))
        assert float(state["square"]["w"]) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_the_first_state_and_what_is_sent(name: str) -> None:
    algorithm = made(name)
    state = algorithm.init(toys.adapter())
    assert all(torch.allclose(value, torch.tensor(0.0025)) for value in state["square"].values())
    assert not any(value.any() for value in state["mean"].values())
    assert algorithm.sends == ("adapter",)
    assert algorithm.combine is None
    with pytest.raises(JobError, match=f"{name} needs one rank"):
        algorithm.check(replace(FACTS, mixed_ranks=True))
    algorithm.check(FACTS)


def test_the_defaults_are_those_of_the_paper() -> None:
    for name, betas in (("fedadagrad", {"beta1": 0.0}), ("fedadam", {"beta1": 0.9, "beta2": 0.99})):
        choice = plugins.parse("algorithm", name)
        assert choice.keys == {"lr": 0.01, "tau": 0.001, **betas}
    assert plugins.parse("algorithm", "fedyogi").keys == plugins.parse("algorithm", "fedadam").keys


# --- planted mistakes


def changed(
    name: str, first: float | None = None, step: Callable[[State, State, int], State] | None = None
) -> Callable[[], Algorithm]:
    def make() -> Algorithm:
        whole = made(name)
        if first is not None:

            def init(adapter: Tensors) -> State:
                state = whole.init(adapter)
                return {**state, "square": {n: torch.full_like(v, first) for n, v in adapter.items()}}

            return replace(whole, init=init)
        assert step
        return replace(whole, server=lambda state, update, tally: step(state, update, tally.round))

    return make


def stepped(state: State, m: Tensors, v: Tensors, root: Callable[[Tensor], Tensor]) -> State:
    step = {n: KEYS["lr"] * m[n] / root(v[n]) for n in m}
    return {"adapter": trees.add(state["adapter"], step), "mean": m, "square": v}


def plain_root(v: Tensor) -> Tensor:
    return v.sqrt() + KEYS["tau"]


def moments(state: State, update: State) -> tuple[Tensors, Tensors]:
    d = trees.subtract(update["adapter"], state["adapter"])
    return d, {n: 0.6 * state["mean"][n] + 0.4 * d[n] for n in d}


def square_of_the_mean(state: State, update: State, number: int) -> State:
    _, m = moments(state, update)
    return stepped(state, m, {n: 0.8 * state["square"][n] + 0.2 * m[n] ** 2 for n in m}, plain_root)


def first_mean_whole(state: State, update: State, number: int) -> State:
    d, m = moments(state, update)
    m = d if number == 1 else m
    return stepped(state, m, {n: 0.8 * state["square"][n] + 0.2 * d[n] ** 2 for n in m}, plain_root)


def bias_corrected(state: State, update: State, number: int) -> State:
    d, m = moments(state, update)
    v = {n: 0.8 * state["square"][n] + 0.2 * d[n] ** 2 for n in m}
    stepped_ = stepped(state, {n: m[n] / (1 - 0.6**number) for n in m}, v, plain_root)
    return {**stepped_, "mean": m}


def tau_under_the_root(state: State, update: State, number: int) -> State:
    d, m = moments(state, update)
    v = {n: 0.8 * state["square"][n] + 0.2 * d[n] ** 2 for n in m}
    return stepped(state, m, v, lambda value: (value + KEYS["tau"]).sqrt())


@pytest.mark.parametrize("broken", [square_of_the_mean, first_mean_whole, bias_corrected, tau_under_the_root])
def test_the_reference_catches_in_adam(broken: Callable[[State, State, int], State]) -> None:
    assert off("fedadam", changed("fedadam", step=broken)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_catches_a_first_square_of_zero(name: str) -> None:
    assert off(name, changed(name, first=0.0)) > 1e-3


def test_the_reference_catches_yogi_without_its_sign() -> None:
    def square(v: Tensor, squared: Tensor) -> Tensor:
        return v - 0.2 * squared

    def late(v: Tensor, squared: Tensor) -> Tensor:
        return v + 0.2 * squared * torch.sign(v - squared)

    for broken in (square, late):
        steps = reference.steps_of(adaptive_step(broken, 0.3, 0.6, 0.05), [1.0, 0.5, 2.0])
        right = reference.steps_of(made("fedyogi"), [1.0, 0.5, 2.0])
        assert steps != pytest.approx(right, abs=1e-3)


def test_the_state_survives_a_checkpoint() -> None:
    toy = toys.toy()
    through, straight = (toys.play(lambda: made("fedadam"), MEAN, 4, toy=toy, restart=r) for r in (True, False))
    assert reference.far(through.servers[-1].state["square"], straight.servers[-1].state["square"]) == 0.0
