"""scaffold: control variates by hand and against a float64 reference; c is their mean; no drift is left."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN, UNIFORM, Number, Numbers
from weft.algorithms.fedavg import fedavg
from weft.algorithms.scaffold import scaffold
from weft.core import trees
from weft.core.errors import JobError
from weft.core.round import run_round
from weft.core.types import Algorithm, Server, State, Tally, Tensors, Work
from weft.links.local import Local
from weft.testing import toys
from weft.testing.toys import Toy, ToySite


def test_two_rounds_by_hand() -> None:
    """Targets 0 and 4, w = 1, lr 0.5, two steps, all controls 0; K lr = 1.

    Round 1: client a goes 1, 0.5, 0.25: c_a = 0.75; b goes 1, 2.5, 3.25: c_b = -2.25. w = 1.75, c = -0.75.
    Round 2, a: 1.75 - 0.5 (1.75 - 0.75 - 0.75) = 1.625, then 1.625 - 0.5 (1.625 - 1.5) = 1.5625,
    c_a = 0.75 + 0.75 + 0.1875 = 1.6875; b: 1.75 - 0.5 (-2.25 + 2.25 - 0.75) = 2.125, then
    2.125 - 0.5 (-1.875 + 1.5) = 2.3125, c_b = -2.25 + 0.75 - 0.5625 = -2.0625. w = 1.9375, c = -0.1875.
    """
    numbers = Numbers(scaffold, [Number(0.0), Number(4.0)], [2, 2], 0.5, start=1.0)
    assert numbers.round() == 1.75
    assert numbers.kept["control"]["w"].flatten().tolist() == [0.75, -2.25]
    assert float(numbers.state["control"]["w"]) == -0.75
    assert numbers.round() == 1.9375
    assert numbers.kept["control"]["w"].flatten().tolist() == [1.6875, -2.0625]
    assert float(numbers.state["control"]["w"]) == -0.1875


def in_float64(toy: Toy, rounds: int, lr: float) -> tuple[Tensors, Tensors, dict[str, Tensors]]:
    """Return w, c and every c_k; every client counts once."""
    w = reference.wide(toys.adapter())
    c, own = trees.zeros(w), {name: trees.zeros(w) for name in toy.clients}
    for cohort in reference.cohorts(toy, rounds):
        ends, changes = [], []
        for name in cohort:

            def corrected(grad: Tensors, now: Tensors, mine: Tensors = own[name], all_: Tensors = c) -> Tensors:
                return {n: grad[n] - mine[n] + all_[n] for n in grad}

            client = toy.clients[name]
            y = reference.trained(client, w, toy.lr, corrected)
            after = {n: own[name][n] - c[n] + (w[n] - y[n]) / (client.steps * toy.lr) for n in w}
            ends.append(trees.subtract(y, w))
            changes.append(trees.subtract(after, own[name]))
            own[name] = after
        share = len(cohort) / len(toy.clients)
        w = {n: value + lr * sum(end[n] for end in ends) / len(ends) for n, value in w.items()}
        c = {n: value + share * sum(change[n] for change in changes) / len(changes) for n, value in c.items()}
    return w, c, own


def played(
    make: Callable[[], Algorithm], toy: Toy, rounds: int, pipeline: list = UNIFORM
) -> tuple[State, dict[str, Tensors]]:
    """Return the server's state and every client's control variate after some rounds."""
    algorithm = make()
    site = ToySite(toy, algorithm, pipeline)
    server = Server(algorithm.init(toys.adapter()))
    for _ in range(rounds):
        server, _ = run_round(server, toy.federation(algorithm, pipeline), Local([site]))
    return server.state, {name: site.kept(name, server.since.get(name, 0))["control"] for name in toy.clients}


def off(make: Callable[[], Algorithm]) -> float:
    toy = toys.toy()
    w, c, own = in_float64(toy, 6, 0.8)
    state, kept = played(make, toy, 6)
    rows = [reference.far(kept[name], own[name]) for name in own]
    return max(reference.far(state["adapter"], w), reference.far(state["control"], c), *rows)


def test_six_rounds_of_three_in_five_are_those_of_the_reference() -> None:
    assert off(lambda: scaffold(lr=0.8)) < 1e-4


def off_the_mean(make: Callable[[], Algorithm], toy: Toy, pipeline: list) -> float:
    """Return how far c is from the mean of all c_k in the weights of the pipeline."""
    state, kept = played(make, toy, 5, pipeline)
    weights = reference.sizes(toy) if pipeline is MEAN else dict.fromkeys(toy.clients, 1.0)
    rows = {name: reference.wide(control) for name, control in kept.items()}
    return reference.far(state["control"], reference.mean(rows, weights))


@pytest.mark.parametrize(("per_round", "pipeline"), [(3, UNIFORM), (1, UNIFORM), (5, UNIFORM), (5, MEAN)])
def test_c_is_the_mean_of_all_controls(per_round: int, pipeline: list) -> None:
    """Those of clients that were never asked are zero and count as well."""
    assert off_the_mean(scaffold, toys.toy(per_round), pipeline) < 1e-5


def test_one_step_of_everyone_is_a_step_on_the_mean_gradient() -> None:
    """W <- w - lr mean_k grad F_k(w) in every round, whatever the control variates are."""
    toy = Toy({name: toys.client(name, steps=1) for name in "abcd"}, 4)
    w = reference.wide(toys.adapter())
    for rounds in range(1, 5):
        rows = {name: reference.trained(client, w, toy.lr) for name, client in toy.clients.items()}
        w = reference.mean(rows, dict.fromkeys(rows, 1.0))
        assert reference.far(played(scaffold, toy, rounds)[0]["adapter"], w) < 1e-5


DRIFT = [Number(-1.0, 0.2), Number(3.0, 1.8)]
POOLED = (0.2 * -1.0 + 1.8 * 3.0) / 2.0


def left(make: Callable[[], Algorithm], weights: tuple[int, ...] = (), goal: float = POOLED) -> float:
    """Return the distance to the pooled optimum after 300 rounds of 10 steps at lr 0.1, with unlike curvatures."""
    return abs(Numbers(make, DRIFT, [10, 10], 0.1, weights=weights).rounds(300) - goal)


def test_drift_is_gone_where_fedavg_keeps_it() -> None:
    """The optimum is (0.2 (-1) + 1.8 (3)) / 2 = 2.6. Ten steps go 1 - 0.98^10 = 0.1829 and 1 - 0.82^10 = 0.8626 of the
    way to the targets, so fedavg rests at (-0.1829 + 3 * 0.8626) / 1.0455 = 2.3001, 0.3 away; scaffold within 1e-6.
    """
    assert left(scaffold) < 1e-6
    assert left(fedavg) == pytest.approx(0.29988, abs=1e-4)


def test_drift_is_gone_with_weights_too() -> None:
    """With 5 and 1 examples the optimum is (5 0.2 (-1) + 1.8 (3)) / (5 0.2 + 1.8) = 4.4 / 2.8."""
    assert left(scaffold, (5, 1), 4.4 / 2.8) < 1e-5
    assert left(fedavg, (5, 1), 4.4 / 2.8) > 0.3


def test_clients_with_unlike_steps_agree_too() -> None:
    """K is each client's own: with 2 and 12 steps the end is still the pooled optimum."""
    numbers = Numbers(scaffold, DRIFT, [2, 12], 0.1)
    assert abs(numbers.rounds(400) - POOLED) < 1e-5


REFUSED = [
    ({"optimizer": "adamw"}, r"scaffold corrects plain gradients, and with adamw \(w - y\) / \(K lr\) is not one: set"),
    ({"momentum": 0.9}, "with momentum .* set local.momentum to 0"),
    ({"schedule": "cosine"}, "set local.schedule to constant"),
    ({"warmup": 0.1}, "local.warmup to 0"),
    ({"per_round": 4}, r"set pipeline to \[weigh: \{by: uniform\}\]"),
    ({"mixed_ranks": True}, "scaffold needs one rank"),
]


@pytest.mark.parametrize(("facts", "sentence"), REFUSED)
def test_jobs_that_it_is_not_defined_for(facts: dict, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        scaffold().check(replace(FACTS, **facts))


def test_jobs_that_it_is_defined_for() -> None:
    scaffold().check(FACTS)
    scaffold().check(replace(FACTS, per_round=4, uniform=True))
    assert scaffold().sends == ("adapter", "control")
    assert scaffold().combine is None


# --- planted mistakes


def client_with(
    correct: Callable[[Tensors, Tensors], Tensors] | None = None,
    change: Callable[[Work, Tensors, Tensors, Tensors], Tensors] | None = None,
) -> Callable[[], Algorithm]:
    """Return a scaffold with another correction, of (c, c_k), or another change, of (work, seen, c, c_k)."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        start, control, own = received["adapter"], received["control"], kept["control"]
        offset = correct(control, own) if correct else trees.subtract(control, own)
        ended = work.train(start, lambda g, w, rows: trees.add(g, {n: v[rows] for n, v in offset.items()}))
        seen = trees.scale(trees.subtract(start, ended), 1 / (work.steps * work.lr))
        moved = change(work, seen, control, own) if change else trees.subtract(seen, control)
        return {"adapter": ended, "change": moved}, {"control": trees.add(own, moved)}

    return lambda: replace(scaffold(lr=0.8), client=client)


def wrong_sign(control: Tensors, own: Tensors) -> Tensors:
    return trees.subtract(own, control)


def without_the_own(control: Tensors, own: Tensors) -> Tensors:
    return control


def longest_counts(work: Work, seen: Tensors, control: Tensors, own: Tensors) -> Tensors:
    """Divide by the steps of the client that has most of the block, as if all had."""
    return trees.subtract(trees.scale(seen, work.steps / work.steps.max()), control)


def option_one_mixed(work: Work, seen: Tensors, control: Tensors, own: Tensors) -> Tensors:
    """Take the corrected gradient for the gradient."""
    return trees.subtract(seen, own)


def server_with(share: Callable[[Tally], float]) -> Callable[[], Algorithm]:
    def server(state: State, update: State, tally: Tally) -> State:
        step = trees.subtract(update["adapter"], state["adapter"])
        return {
            "adapter": trees.add(state["adapter"], step, 0.8),
            "control": trees.add(state["control"], update["change"], share(tally)),
        }

    return lambda: replace(scaffold(), server=server)


BROKEN = {
    "wrong sign": client_with(wrong_sign),
    "without c_k": client_with(without_the_own),
    "K of the longest": client_with(change=longest_counts),
    "corrected as plain": client_with(change=option_one_mixed),
    "no |S|/N": server_with(lambda tally: 1.0),
    "1/N": server_with(lambda tally: 1 / tally.population),
    "c never moves": server_with(lambda tally: 0.0),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_reference_catches(broken: Callable[[], Algorithm]) -> None:
    assert off(broken) > 1e-3


def test_the_harness_of_the_mistakes_is_sound() -> None:
    assert off(client_with()) < 1e-4
    assert off(server_with(lambda tally: len(tally.weights) / tally.population)) < 1e-4


def uniform_control() -> Algorithm:
    """Average w by examples and c alike: scale the change by mean size / own size before the weighted mean."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        update, kept = scaffold().client(work, received, kept)
        own: Tensor = torch.tensor([5.0, 1.0]).mean() / work.examples
        return {**update, "change": trees.scale(update["change"], own)}, kept

    return replace(scaffold(), client=client)


def test_weighted_w_with_uniform_c_is_caught() -> None:
    assert left(uniform_control, (5, 1), 4.4 / 2.8) > 0.1
