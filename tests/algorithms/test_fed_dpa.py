"""fed_dpa: the global pair is fedavg's, the local one trains beside it, and both are one adapter."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN
from weft.algorithms import fed_dpa as module
from weft.algorithms.fed_dpa import fed_dpa
from weft.algorithms.fedavg import fedavg
from weft.core import low_rank, trees
from weft.core.errors import JobError
from weft.core.types import Tensors
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Toy

A, B = "m.lora_A.default.weight", "m.lora_B.default.weight"


def test_what_is_used_by_hand() -> None:
    """Global 2 x 3 = 6, local 5 x 4 = 20: 0.75 * 6 + 0.25 * 20 = 9.5."""
    pair = {A: torch.tensor([[3.0]]), B: torch.tensor([[2.0]])}
    own = {A: torch.tensor([[4.0]]), B: torch.tensor([[5.0]])}
    used = fed_dpa(0.25).serve({"adapter": pair}, {"own": own}, {})
    assert float(used[B] @ used[A]) == pytest.approx(9.5)
    assert used[A].shape == (2, 1)


def test_the_global_adapter_is_that_of_fedavg() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (fed_dpa, fedavg))
    assert bits(one.servers[-1].state) == bits(other.servers[-1].state)


def test_weight_zero_uses_the_adapter_of_fedavg() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (lambda: fed_dpa(0.0), fedavg))
    assert bits(one.used) == bits(other.used)


def in_float64(toy: Toy, rounds: int, a: float) -> dict[str, Tensors]:
    """Step on the local B and A: dL/dB_l = a G A_l^T, dL/dA_l = a B_l^T G, at W = (1 - a) B A + a B_l A_l."""
    whole = reference.wide(toys.adapter())
    first = {A: whole[A], B: whole[B] * 0}
    own = dict.fromkeys(toy.clients, first)
    for cohort in reference.cohorts(toy, rounds):
        for name in cohort:
            client, pair = toy.clients[name], dict(own[name])
            for _ in range(client.steps):
                w = (1 - a) * whole[B] @ whole[A] + a * pair[B] @ pair[A]
                error = w - client.target["m"].double()
                grads = {B: a * error @ pair[A].T, A: a * pair[B].T @ error}
                pair = {n: pair[n] - toy.lr * grads[n] for n in pair}
            own[name] = pair
        rows = {name: reference.trained(toy.clients[name], whole, toy.lr) for name in cohort}
        whole = reference.mean(rows, reference.sizes(toy))
    return {
        name: {
            "m": (1 - a) * whole[B] @ whole[A] + a * pair[B] @ pair[A],
            **{n: whole[n] for n in ("n.bias", "n.weight")},
        }
        for name, pair in own.items()
    }


def far(a: float = 0.4) -> float:
    toy = toys.toy(5)
    used, expected = toys.play(lambda: fed_dpa(a), MEAN, 5, toy=toy).used, in_float64(toy, 5, a)
    return max(reference.far(toys.effective(used[name]), expected[name]) for name in expected)


@pytest.mark.parametrize("a", [0.1, 0.4, 0.9])
def test_five_rounds_are_those_of_the_reference(a: float) -> None:
    assert far(a) < 1e-5


def test_the_local_pair_is_its_clients_alone() -> None:
    """Another client's target changes nothing of what a keeps, in the first round, where all begin alike."""
    toy = toys.toy(5)
    wild = {n: 2 * v for n, v in toy.clients["b"].target.items()}
    other = Toy({**toy.clients, "b": replace(toy.clients["b"], target=wild)}, 5)
    kept = []
    for one in (toy, other):
        memories: dict[Any, bytes] = {}
        site = toys.ToySite(one, fed_dpa(), MEAN, memories=memories)
        from weft.core.round import run_round
        from weft.core.types import Server
        from weft.links.local import Local

        run_round(Server(fed_dpa().init(toys.adapter())), one.federation(fed_dpa(), MEAN), Local([site]))
        kept.append(memories["a", 1])
    assert kept[0] == kept[1]


def test_clients_of_unlike_targets_use_better_adapters_than_the_shared_one() -> None:
    toy = toys.toy(5)
    own, shared = (toys.play(make, MEAN, 30, toy=toy).used for make in (fed_dpa, fedavg))
    assert sum(c.loss(own[n]) for n, c in toy.clients.items()) < sum(c.loss(shared[n]) for n, c in toy.clients.items())


def unscaled_gradient(side: Tensors, weight: float) -> Any:
    """The planted bug: the local B steps as a B would."""
    return low_rank.frozen(side)


def not_frozen(side: Tensors, weight: float) -> Any:
    """The planted bug: the global pair moves while the local one is trained."""
    return lambda grads, params, rows: grads


@pytest.mark.parametrize("broken", [unscaled_gradient, not_frozen])
def test_planted_bugs_are_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_local", broken)
    assert far() > 1e-3


def test_nothing_of_the_local_pair_is_sent() -> None:
    algorithm = fed_dpa()
    assert algorithm.sends == ("adapter",)
    work = toys.ToyWork(
        ("a",),
        (toys.client("a"),),
        0.1,
        torch.ones(1),
        torch.tensor([2]),
        torch.zeros(1),
        trees.expand(toys.adapter(), 1),
        1,
    )
    kept = trees.expand_state(algorithm.keep(toys.adapter()), 1)
    update, _ = algorithm.client(work, trees.expand_state(algorithm.init(toys.adapter()), 1), kept)
    assert {name: value.shape for name, value in update["adapter"].items()} == {
        name: (1, *value.shape) for name, value in toys.adapter().items()
    }


@pytest.mark.parametrize(
    "change", [{"mixed_ranks": True}, {"moments": "keep"}, {"low_rank": False}, {"weight_decay": 0.1}, {"dp": True}]
)
def test_what_it_is_not_defined_for_is_refused(change: dict[str, Any]) -> None:
    fed_dpa().check(FACTS)
    with pytest.raises(JobError, match="fed_dpa"):
        fed_dpa().check(replace(FACTS, **change))


def test_without_a_local_pair_it_trains_once_and_so_goes_with_local_dp() -> None:
    fed_dpa(weight=0.0).check(replace(FACTS, dp=True))
