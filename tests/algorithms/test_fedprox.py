"""fedprox: the pull by hand, in closed form, against a float64 reference, and as fedavg without it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN
from weft.algorithms.fedavg import fedavg
from weft.algorithms.fedprox import fedprox
from weft.algorithms.proximal import pull
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Tensors, Work
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Toy

Pull = Callable[[Tensors, Tensors, Tensor], Tensors]


def test_the_added_gradient_by_hand() -> None:
    """With mu = 0.5, the clients of rows 2 and 0 have anchors 3 and 1, w = 4 and 4, gradients 2 and 0:
    2 + 0.5 (4 - 3) = 2.5 and 0 + 0.5 (4 - 1) = 1.5.
    """
    gradient = pull({"w": torch.tensor([1.0, 2.0, 3.0])}, 0.5)
    got = gradient({"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([4.0, 4.0])}, torch.tensor([2, 0]))
    assert got["w"].tolist() == [2.5, 1.5]


def test_two_steps_by_hand() -> None:
    """Target 8, lr 0.5, mu 1, w = 0. Step 1: g = -8 + 0, w = 4. Step 2: g = -4 + 4 = 0, w = 4. fedavg: 4, then 6."""
    clients = [reference.Number(8.0)]
    assert reference.Numbers(lambda: fedprox(mu=1.0), clients, [2], 0.5).round() == 4.0
    assert reference.Numbers(fedavg, clients, [2], 0.5).round() == 6.0


def test_a_client_in_closed_form() -> None:
    """On 0.5 |w - t|^2 + mu/2 |w - w0|^2 the end is o + (1 - lr (1 + mu))^K (w0 - o), o = (t + mu w0) / (1 + mu)."""
    client, first = toys.client("a", steps=6), toys.adapter()["n.bias"]
    got = reference.ended(lambda: fedprox(mu=3.0), Toy({"a": client}, 1), 1)["n.bias"]
    goal = (client.target["n.bias"] + 3 * first) / 4
    assert torch.allclose(got, goal + (1 - 0.05 * 4) ** 6 * (first - goal), atol=1e-6)


def in_float64(toy: Toy, rounds: int, mu: float) -> Tensors:
    w = reference.wide(toys.adapter())
    for cohort in reference.cohorts(toy, rounds):

        def pulled(grad: Tensors, now: Tensors, start: Tensors = w) -> Tensors:
            return {n: grad[n] + mu * (now[n] - start[n]) for n in grad}

        rows = {name: reference.trained(toy.clients[name], w, toy.lr, pulled) for name in cohort}
        w = reference.mean(rows, reference.sizes(toy))
    return w


def off(make: Callable[[], Algorithm]) -> float:
    toy = toys.toy()
    return reference.far(reference.ended(make, toy), in_float64(toy, 5, 2.0))


def test_five_rounds_are_those_of_the_reference() -> None:
    assert off(lambda: fedprox(mu=2.0)) < 1e-5


def test_without_a_pull_the_bits_are_those_of_fedavg() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (fedavg, lambda: fedprox(mu=0.0)))
    assert bits(one.used) == bits(other.used)


def test_a_stronger_pull_moves_less() -> None:
    toy = Toy({"a": toys.client("a", steps=8)}, 1)
    moved = [
        trees.norm(trees.subtract(reference.ended(lambda mu=mu: fedprox(mu=mu), toy, 1), toys.adapter()))
        for mu in (0.0, 0.01, 0.1, 1.0, 10.0)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 1.5 * moved[-1]


def test_its_keys_and_what_it_refuses() -> None:
    with pytest.raises(JobError, match="fedprox needs one rank"):
        fedprox().check(replace(FACTS, mixed_ranks=True))
    fedprox().check(replace(FACTS, optimizer="adamw", schedule="cosine"))
    assert fedprox().combine is None
    assert fedprox().init(toys.adapter()).keys() == {"adapter"}


# --- planted mistakes


def pulling(change: Callable[[Tensors, Tensors, Tensors], Tensors]) -> Callable[[], Algorithm]:
    """Return a fedprox whose correction of (grads, params, start) is another."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        start = received["adapter"]

        def gradient(grads: Tensors, params: Tensors, rows: Tensor) -> Tensors:
            return change(grads, params, {n: v[rows] for n, v in start.items()})

        return {"adapter": work.train(start, gradient)}, kept

    return lambda: replace(fedprox(), client=client)


def twice(grads: Tensors, params: Tensors, start: Tensors) -> Tensors:
    return {n: grads[n] + 2 * 2.0 * (params[n] - start[n]) for n in grads}


def detached(grads: Tensors, params: Tensors, start: Tensors) -> Tensors:
    return grads


def not_squared(grads: Tensors, params: Tensors, start: Tensors) -> Tensors:
    """The gradient of mu |w - start| and not of mu/2 |w - start|^2."""
    away = trees.subtract(params, start)
    return {n: grads[n] + 2.0 * away[n] / max(trees.norm(away), 1e-9) for n in grads}


def away(grads: Tensors, params: Tensors, start: Tensors) -> Tensors:
    return {n: grads[n] - 2.0 * (params[n] - start[n]) for n in grads}


def aliased(grads: Tensors, params: Tensors, start: Tensors) -> Tensors:
    return {n: grads[n] + 2.0 * (params[n] - params[n]) for n in grads}


@pytest.mark.parametrize("broken", [twice, detached, not_squared, away, aliased])
def test_the_reference_catches(broken: Callable[..., Tensors]) -> None:
    assert off(pulling(broken)) > 1e-3


def test_the_harness_of_the_mistakes_is_sound() -> None:
    """The right correction, planted in the same way, agrees: what is caught is the mistake."""
    right = pulling(lambda g, w, start: {n: g[n] + 2.0 * (w[n] - start[n]) for n in g})
    assert off(right) < 1e-5
