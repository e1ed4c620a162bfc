"""fednova: a_k by hand and by simulation, rounds against a float64 reference, fedavg where all a_k are equal."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, Number, Numbers
from weft.algorithms.fedavg import fedavg
from weft.algorithms.fednova import fednova, lengths
from weft.algorithms.proximal import pull
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Tally, Tensors, Work
from weft.testing import toys
from weft.testing.toys import Toy


def test_a_round_by_hand() -> None:
    """Targets 0 and 8, lr 0.5, 1 and 2 steps, w = 4. a: 2, d = -2 / 1; b: 6, 7, d = 3 / 2. Mean d = -0.25,
    mean a = 1.5, w = 4 - 0.375 = 3.625. fedavg: (2 + 7) / 2 = 4.5.
    """
    clients = [Number(0.0), Number(8.0)]
    assert Numbers(fednova, clients, [1, 2], 0.5, start=4.0).round() == 3.625
    assert Numbers(fedavg, clients, [1, 2], 0.5, start=4.0).round() == 4.5


def test_weights_by_hand() -> None:
    """The same with 3 and 1 examples: mean d = (3 (-2) + 1.5) / 4 = -1.125, mean a = 5 / 4, w = 4 - 1.40625."""
    clients = [Number(0.0), Number(8.0)]
    assert Numbers(fednova, clients, [1, 2], 0.5, start=4.0, weights=[3, 1]).round() == 2.59375


def test_lengths_by_hand() -> None:
    """Momentum 0.5: 1, 1 + 1.5, 1 + 1.5 + 1.75. lr mu = 0.5: 1, 1 + 0.5, 1 + 0.5 + 0.25. Neither: the steps."""
    steps = torch.tensor([1, 2, 3])
    assert lengths(steps, 0.5, 0.0).tolist() == [1.0, 2.5, 4.25]
    assert lengths(steps, 0.0, 0.5).tolist() == [1.0, 1.5, 1.75]
    assert lengths(steps, 0.0, 0.0).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.3, 0.0), (0.0, 0.7), (0.0, 9.0)])
def test_lengths_are_how_far_a_gradient_of_one_carries(momentum: float, mu: float) -> None:
    for steps in (1, 2, 7, 40):
        place, velocity = 0.0, 0.0
        for _ in range(steps):
            velocity = momentum * velocity + 1.0 + mu * place
            place -= 0.1 * velocity
        assert float(lengths(torch.tensor([steps]), momentum, 0.1 * mu)) == pytest.approx(-place / 0.1, rel=1e-6)


def in_float64(toy: Toy, rounds: int, mu: float = 0.0) -> Tensors:
    w = reference.wide(toys.adapter())
    for cohort in reference.cohorts(toy, rounds):

        def pulled(grad: Tensors, now: Tensors, start: Tensors = w) -> Tensors:
            return {n: grad[n] + mu * (now[n] - start[n]) for n in grad}

        total = sum(toy.clients[name].examples for name in cohort)
        mean_d, mean_a = trees.zeros(w), 0.0
        for name in cohort:
            client = toy.clients[name]
            share, keeps = client.examples / total, 1 - toy.lr * mu
            # How often the gradient of each step counts in the end: later steps repeat it, or take of it away.
            left = [client.steps - 1 - i for i in range(client.steps)]
            counts = [sum(toy.momentum**j for j in range(later + 1)) * keeps**later for later in left]
            a = sum(counts)
            change = trees.subtract(reference.trained(client, w, toy.lr, pulled, toy.momentum), w)
            mean_d = trees.add(mean_d, change, share / a)
            mean_a += share * a
        w = trees.add(w, mean_d, mean_a)
    return w


SETTINGS = [(0.0, 0.0), (0.6, 0.0), (0.0, 3.0)]


def off(make: Callable[[float], Algorithm], momentum: float, mu: float) -> float:
    toy = replace(toys.toy(), momentum=momentum)
    return reference.far(reference.ended(lambda: make(mu), toy), in_float64(toy, 5, mu))


@pytest.mark.parametrize(("momentum", "mu"), SETTINGS)
def test_five_rounds_are_those_of_the_reference(momentum: float, mu: float) -> None:
    assert off(lambda mu: fednova(mu=mu), momentum, mu) < 1e-5


def test_equal_steps_give_fedavg() -> None:
    clients = {name: toys.client(name, size, steps=5) for name, size in (("a", 1), ("b", 4), ("c", 2))}
    toy = Toy(clients, 2, momentum=0.5)
    assert reference.far(reference.ended(fednova, toy), reference.wide(reference.ended(fedavg, toy))) < 1e-6


def test_it_rests_nearer_the_optimum_than_fedavg() -> None:
    """Targets -1 and 3, optimum 1, lr 0.005, 2 and 20 steps: 1 - 0.995^2 = 0.009975 and 1 - 0.995^20 = 0.095390 of the
    way. fedavg rests at (-0.009975 + 3 * 0.095390) / 0.105365 = 2.6213; fednova divides them by 2 and 20 and rests at
    (-0.0049875 + 3 * 0.0047695) / 0.009757 = 0.9553: 36 times nearer.
    """
    ends = [Numbers(make, [Number(-1.0), Number(3.0)], [2, 20], 0.005).rounds(200) for make in (fedavg, fednova)]
    assert ends == pytest.approx([2.6213, 0.9553], abs=1e-3)


def test_the_journal_measures_what_a_client_ended_with() -> None:
    algorithm, client = fednova(), toys.client("a", steps=3)
    work = toys.ToyWork(("a",), (client,), 0.05, torch.ones(1), torch.tensor([3]), torch.zeros(1), {}, 1)
    received = {"adapter": toys.adapter()}
    update, _ = algorithm.client(work, trees.expand_state(received, 1), {})
    assert algorithm.effective
    ended = algorithm.effective(received, trees.pick_state(update, 0), toys.adapter())
    assert reference.far(ended, reference.trained(client, reference.wide(toys.adapter()), 0.05)) < 1e-6
    assert trees.count(update["length"]) == 1


REFUSED = [
    ({"optimizer": "adamw"}, 0.0, "adamw has no formula for.*heuristic"),
    ({"momentum": 0.9}, 0.1, "momentum or a proximal term, not both"),
    ({"momentum": 0.9, "moments": "keep"}, 0.0, "local.moments to reset"),
    ({"schedule": "linear"}, 0.0, "local.schedule to constant"),
    ({"warmup": 0.1}, 0.0, "local.warmup to 0"),
    ({"lr": 0.5}, 2.0, "needs lr mu below 1, and 0.5 x 2 is not"),
    ({"mixed_ranks": True}, 0.0, "fednova needs one rank"),
]


@pytest.mark.parametrize(("facts", "mu", "sentence"), REFUSED)
def test_jobs_that_it_is_not_defined_for(facts: dict, mu: float, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        fednova(mu=mu).check(replace(FACTS, **facts))


def test_jobs_that_it_is_defined_for() -> None:
    fednova().check(replace(FACTS, momentum=0.9))
    fednova(mu=0.1).check(FACTS)
    fednova(heuristic=True).check(replace(FACTS, optimizer="adamw", schedule="cosine"))
    with pytest.raises(JobError, match="one rank"):
        fednova(heuristic=True).check(replace(FACTS, mixed_ranks=True))
    assert fednova().combine is None


def test_the_heuristic_counts_steps_whatever_the_optimizer() -> None:
    """Momentum 0.5 and 1 and 2 steps from 4 to targets 0 and 8, lr 0.5: a: 2; b: 6, then 6 + 0.5 (2 + 0.5 * 4) = 8,
    d = 4 / 2. Mean d = 0, so nothing moves; with the right a_k, 2.5, d_b = 1.6 and w = 4 - 1.75 * 0.2 = 3.65.
    """
    clients = [Number(0.0), Number(8.0)]
    assert Numbers(lambda: fednova(heuristic=True), clients, [1, 2], 0.5, 4.0, momentum=0.5).round() == 4.0
    assert Numbers(fednova, clients, [1, 2], 0.5, 4.0, momentum=0.5).round() == pytest.approx(3.65)


# --- planted mistakes


def with_lengths(count: Callable[[Work, float], Tensor]) -> Callable[[float], Algorithm]:
    def make(mu: float) -> Algorithm:
        def client(work: Work, received: State, kept: State) -> tuple[State, State]:
            start = received["adapter"]
            change = trees.subtract(work.train(start, pull(start, mu)), start)
            a = count(work, mu).float()
            return {"direction": trees.scale(change, 1 / a), "length": {"a": a[:, None]}}, kept

        return replace(fednova(mu=mu), client=client)

    return make


def exact(work: Work, mu: float) -> Tensor:
    return lengths(work.steps, work.momentum, work.lr * mu)


def without_mu(work: Work, mu: float) -> Tensor:
    return lengths(work.steps, work.momentum, 0.0)


def steps_alone(work: Work, mu: float) -> Tensor:
    return work.steps


def longest(work: Work, mu: float) -> Tensor:
    return exact(work, mu).max().expand(len(work.steps))


def official_with_mu(work: Work, mu: float) -> Tensor:
    """Take the rate for one: 1 - mu in place of 1 - lr mu."""
    return lengths(work.steps, work.momentum, 0.9 * mu / 3)


MISTAKES = [(steps_alone, 0.6, 0.0), (steps_alone, 0.0, 3.0), (longest, 0.0, 0.0), (without_mu, 0.0, 3.0)]


@pytest.mark.parametrize(("count", "momentum", "mu"), [*MISTAKES, (official_with_mu, 0.0, 3.0)])
def test_the_reference_catches(count: Callable[[Work, float], Tensor], momentum: float, mu: float) -> None:
    assert off(with_lengths(count), momentum, mu) > 1e-3


def not_stretched(mu: float) -> Algorithm:
    """Step by the mean direction alone."""

    def server(state: State, update: State, tally: Tally) -> State:
        return {"adapter": trees.add(state["adapter"], update["direction"])}

    return replace(fednova(mu=mu), server=server)


@pytest.mark.parametrize(("momentum", "mu"), SETTINGS)
def test_the_reference_catches_a_step_without_tau(momentum: float, mu: float) -> None:
    assert off(not_stretched, momentum, mu) > 1e-3
    assert off(with_lengths(exact), momentum, mu) < 1e-5
