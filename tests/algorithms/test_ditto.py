"""ditto: a personal adapter near the global one; by hand, against a reference, as local and fedavg at its ends."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN, Number, Numbers
from weft.algorithms.ditto import ditto
from weft.algorithms.fedavg import fedavg
from weft.algorithms.local import local
from weft.algorithms.proximal import pull
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Tensors, Work
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Toy


def test_two_rounds_by_hand() -> None:
    """One step of lr 0.5, mu 1, targets 0 and 8, w = v = 4.

    Round 1: w_a = 2, w_b = 6, w = 4. v_a = 4 - 0.5 (4 + 0) = 2, v_b = 4 - 0.5 (-4 + 0) = 6.
    Round 2: v_a = 2 - 0.5 (2 + (2 - 4)) = 2, v_b = 6 - 0.5 (-2 + (6 - 4)) = 6: the mean of own optimum and w.
    """
    numbers = Numbers(lambda: ditto(mu=1.0), [Number(0.0), Number(8.0)], [1, 1], 0.5, start=4.0)
    for _ in range(2):
        assert numbers.round() == 4.0
        assert numbers.kept["personal"]["w"].flatten().tolist() == [2.0, 6.0]


def in_float64(toy: Toy, rounds: int, mu: float) -> dict[str, Tensors]:
    w = reference.wide(toys.adapter())
    own = dict.fromkeys(toy.clients, w)
    for cohort in reference.cohorts(toy, rounds):

        def pulled(grad: Tensors, now: Tensors, anchor: Tensors = w) -> Tensors:
            return {n: grad[n] + mu * (now[n] - anchor[n]) for n in grad}

        rows = {name: reference.trained(toy.clients[name], w, toy.lr) for name in cohort}
        own |= {name: reference.trained(toy.clients[name], own[name], toy.lr, pulled) for name in cohort}
        w = reference.mean(rows, reference.sizes(toy))
    return own


def off(make: Callable[[], Algorithm]) -> float:
    toy = toys.toy()
    used, expected = toys.play(make, MEAN, 5, toy=toy).used, in_float64(toy, 5, 1.5)
    return max(reference.far(used[name], expected[name]) for name in expected)


def test_five_rounds_are_those_of_the_reference() -> None:
    assert off(lambda: ditto(mu=1.5)) < 1e-5


def test_the_global_adapter_is_that_of_fedavg() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (fedavg, ditto))
    assert bits([s.state for s in one.servers]) == bits([s.state for s in other.servers])


def test_without_a_pull_the_personal_ones_are_those_of_local() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (local, lambda: ditto(mu=0.0)))
    assert bits(one.used) == bits(other.used)


def test_a_stronger_pull_brings_them_nearer_to_the_global_one() -> None:
    toy = toys.toy(per_round=5)
    distances = []
    for mu in (0.0, 0.3, 3.0, 15.0):
        played = toys.play(lambda mu=mu: ditto(mu=mu), MEAN, 15, toy=toy)
        whole = played.servers[-1].state["adapter"]["n.weight"]
        distances.append(float(sum((used["n.weight"] - whole).norm() for used in played.used.values())))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 5 * distances[-1]


def test_it_ends_between_its_own_optimum_and_the_global_one() -> None:
    """The minimum of 0.5 |v - t|^2 + mu/2 |v - w|^2 is (t + mu w) / (1 + mu)."""
    toy = toys.toy(per_round=5)
    played = toys.play(lambda: ditto(mu=1.0), MEAN, 60, toy=toy)
    whole = played.servers[-1].state["adapter"]["n.bias"]
    for name, client in toy.clients.items():
        assert torch.allclose(played.used[name]["n.bias"], (client.target["n.bias"] + whole) / 2, atol=1e-4)


def test_who_is_not_asked_uses_the_first_adapter() -> None:
    played = toys.play(ditto, MEAN, 1, toy=toys.toy(per_round=2))
    first = [name for name, used in played.used.items() if bits(used) == bits(toys.adapter())]
    assert len(first) == 3
    assert set(first).isdisjoint(played.servers[-1].since)


def test_what_it_declares_and_refuses() -> None:
    assert ditto().personal
    assert ditto().combine is None
    assert ditto().keep(toys.adapter()).keys() == {"personal"}
    ditto().check(replace(FACTS, optimizer="adamw"))
    for facts, sentence in (({"moments": "keep"}, "local.moments to reset"), ({"mixed_ranks": True}, "one rank")):
        with pytest.raises(JobError, match=sentence):
            ditto().check(replace(FACTS, **facts))


# --- planted mistakes


def with_personal(train: Callable[[Work, Tensors, Tensors, Tensors], Tensors]) -> Callable[[], Algorithm]:
    """Return a ditto that trains the personal adapter otherwise: (work, received, trained, own) -> own."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        trained = work.train(received["adapter"])
        return {"adapter": trained}, {"personal": train(work, received["adapter"], trained, kept["personal"])}

    return lambda: replace(ditto(), client=client)


def right(work: Work, received: Tensors, trained: Tensors, own: Tensors) -> Tensors:
    return work.train(own, pull(received, 1.5))


def from_the_received(work: Work, received: Tensors, trained: Tensors, own: Tensors) -> Tensors:
    return work.train(received, pull(received, 1.5))


def to_its_own(work: Work, received: Tensors, trained: Tensors, own: Tensors) -> Tensors:
    return work.train(own, pull(own, 1.5))


def to_the_trained(work: Work, received: Tensors, trained: Tensors, own: Tensors) -> Tensors:
    return work.train(own, pull(trained, 1.5))


def twice(work: Work, received: Tensors, trained: Tensors, own: Tensors) -> Tensors:
    return work.train(own, pull(received, 3.0))


def mixed(work: Work, received: Tensors, trained: Tensors, own: Tensors) -> Tensors:
    """Interpolate afterwards in place of a pull in each step."""
    after = work.train(own)
    return {n: (after[n] + 1.5 * received[n]) / 2.5 for n in after}


@pytest.mark.parametrize("broken", [from_the_received, to_its_own, to_the_trained, twice, mixed])
def test_the_reference_catches(broken: Callable[..., Tensors]) -> None:
    assert off(with_personal(broken)) > 1e-3
    assert off(with_personal(right)) < 1e-5


def test_the_comparison_with_fedavg_catches_a_personal_upload() -> None:
    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        _, kept = ditto().client(work, received, kept)
        return {"adapter": kept["personal"]}, kept

    def make() -> Algorithm:
        return replace(ditto(), client=client)

    leaky, clean = (toys.play(made, MEAN, 3, toy=toys.toy()) for made in (make, ditto))
    assert bits(leaky.servers[-1].state) != bits(clean.servers[-1].state)
    assert trees.count(leaky.servers[-1].state["adapter"]) == trees.count(toys.adapter())
