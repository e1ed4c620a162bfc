"""frlora: W + the sum over the rounds of (mean B mean A - B0 A0); every round begins with the first factors."""

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms import frlora as module
from weft.algorithms.frlora import frlora
from weft.core import low_rank, trees
from weft.core.errors import JobError
from weft.core.types import Tensors


def test_by_hand() -> None:
    """From B0 A0 = 1 * 2 the means are 4 and 6: the served product is 2 - 2 + 24 = 24, and after another
    round of the same 24 - 2 + 24 = 46.
    """
    state = frlora().init(cases.pair([[1.0]], [[2.0]]))
    updates = {"a": {"trained": cases.pair([[1.0]], [[3.0]])}, "b": {"trained": cases.pair([[5.0]], [[7.0]])}}
    for product in (24.0, 46.0):
        state = cases.combined(frlora(), state, updates, {"a": 1, "b": 3})
        assert cases.dense(state["adapter"], 1.0)["m"].tolist() == [[pytest.approx(product)]]


def rounds(first: Tensors, count: int = 4, max_rank: int | None = None, **how: object) -> list[cases.Step]:
    steps, state = [], frlora(max_rank).init(first)
    for number in range(1, count + 1):
        steps.append(cases.one_round(frlora(max_rank), state, number, initial=first, **how))  # type: ignore[arg-type]
        state = steps[-1].state
    return steps


@pytest.mark.parametrize("begun", [False, True])
def test_the_base_moves_by_the_mean_factors_of_each_round(begun: bool) -> None:
    first = cases.first(begun=begun)
    wanted = cases.dense(first)
    for step in rounds(first):
        mean = {
            name: sum(step.updates[c]["trained"][name].double() * n / 8 for c, n in cases.SIZES.items())
            for name in low_rank.factors(first)
        }
        added = trees.subtract(cases.dense(mean), cases.dense(first))  # type: ignore[arg-type]
        wanted = trees.add(wanted, added)
        assert cases.distance(cases.dense(step.served), wanted) < 1e-6
        assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())
        assert cases.error(step) == pytest.approx(cases.journal_error(step), rel=1e-4)
    assert cases.error(step) > 1e-3  # the mean of the factors is not that of the products


@pytest.mark.parametrize("begun", [False, True])
def test_nobody_moves_nothing_moves(begun: bool) -> None:
    first = cases.first(begun=begun)
    for step in rounds(first, rate=0.0):
        got, wanted = cases.dense(step.served), cases.dense(first)
        assert all(float((got[layer] - wanted[layer]).abs().max()) < 1e-6 for layer in wanted)


def test_clients_begin_every_round_with_the_first_factors_and_the_served_function() -> None:
    first = cases.first(begun=True)
    served = rounds(first, 2)[-1]
    began = cases.one_round(frlora(), served.state, 3, initial=first, rate=0.0)
    sent = began.updates["a"]["trained"]
    assert all(torch.equal(sent[name], value) for name, value in low_rank.factors(first).items())
    assert cases.distance(cases.dense(began.ended["a"]), cases.dense(served.served)) < 1e-6


def test_the_rank_grows_by_one_adapter_a_round_up_to_full_rank() -> None:
    """4 ranks a round where B0 is zero, and at most 4, 5 and 6."""
    small = cases.first(rank=2)
    for step, most in zip(rounds(small), (2, 4, 6, 8), strict=False):
        found = [low_rank.ranks(step.served, a) for _, a in low_rank.pairs(step.served)]
        assert found == [min(most, side) for side in (4, 5, 6)]
    cut = rounds(small, max_rank=3)[-1]
    assert {low_rank.ranks(cut.served, a) for _, a in low_rank.pairs(cut.served)} == {3}


def test_one_client_alone_is_exact() -> None:
    for step in rounds(cases.first(), sizes={"a": 1}):
        assert cases.error(step, {"a": 1}) < 1e-6


def test_a_sum_is_all_the_server_needs() -> None:
    assert frlora().combine is None
    assert frlora().sends == ("adapter",)


def forgetting_the_first(tensors: Tensors) -> Tensors:
    return low_rank.no_ranks(tensors)


def twice(tensors: Tensors) -> Tensors:
    return {name: value * -2 if low_rank.B in name else value for name, value in low_rank.factors(tensors).items()}


@pytest.mark.parametrize("broken", [forgetting_the_first, twice])
def test_planted_bugs_are_caught(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.low_rank, "minus", broken)
    for check in (test_nobody_moves_nothing_moves, test_the_base_moves_by_the_mean_factors_of_each_round):
        with pytest.raises(AssertionError):
            check(True)


@pytest.mark.parametrize("changes", [{"weight_decay": 0.1}, {"mixed_ranks": True}, {"moments": "keep"}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    frlora().check(cases.facts())
    with pytest.raises(JobError, match="frlora"):
        frlora().check(cases.facts(**changes))
