"""fedex_lora: mean factors and the rest beside them are the mean of the products."""

from collections.abc import Callable

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms import fedex_lora as module
from weft.algorithms.fedex_lora import fedex_lora, residual
from weft.core import low_rank
from weft.core.errors import JobError, RunError
from weft.core.types import Algorithm, Tensors
from weft.testing.sound import bits


def test_by_hand() -> None:
    """B A is 1 * 1 and 3 * 5, in the mean 8; the mean factors give 2 * 3 = 6; the side has (1/2)(1 - 3)(1 - 3) = 2."""
    state = fedex_lora().init(cases.pair([[0.0]], [[1.0]]))
    updates = {"a": {"adapter": cases.pair([[1.0]], [[1.0]])}, "b": {"adapter": cases.pair([[3.0]], [[5.0]])}}
    after = cases.combined(fedex_lora(), state, updates, {"a": 1, "b": 1})
    assert cases.flat(after["adapter"], "B") + cases.flat(after["adapter"], "A") == [2.0, 3.0]
    assert cases.dense(after["side"], 1.0)["m"].tolist() == [[2.0]]
    assert cases.dense(fedex_lora().serve(after, {}, {}), 1.0)["m"].tolist() == [[8.0]]


def rounds(algorithm: Algorithm, count: int = 4, **how: object) -> list[cases.Step]:
    steps, state = [], algorithm.init(cases.first())
    for number in range(1, count + 1):
        steps.append(cases.one_round(algorithm, state, number, **how))  # type: ignore[arg-type]
        state = steps[-1].state
    return steps


def test_every_round_is_exact_and_the_factors_are_the_means() -> None:
    for step in rounds(fedex_lora()):
        assert cases.error(step) < 1e-6
        assert cases.journal_error(step) < 1e-6
        assert cases.journal_error(step, adapter=cases.STABLE) < 1e-6
        for name, value in step.state["adapter"].items():
            parts = [step.updates[c]["adapter"][name].double() * n / 8 for c, n in cases.SIZES.items()]
            assert torch.allclose(value.double(), torch.stack(parts).sum(0), atol=1e-6)
        assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())


def test_the_side_grows_by_the_other_clients_ranks_up_to_full_rank() -> None:
    """Two of three clients with 4 ranks: 8 ranks a round, but no more than the smaller side of the layer."""
    step = rounds(fedex_lora(), 2)[0]
    assert [low_rank.ranks(step.state["side"], a) for _, a in low_rank.pairs(step.state["side"])] == [4, 5, 6]
    side = residual([cases.first(begun=True)] * 3, cases.first(begun=True), [0.3, 0.3, 0.4])
    assert {low_rank.ranks(side, a) for _, a in low_rank.pairs(side)} == {8}
    assert not any(low_rank.ranks(low_rank.compact(side), a) for _, a in low_rank.pairs(side))


def test_clients_leave_the_side_alone_and_do_not_send_it() -> None:
    before, step = rounds(fedex_lora(), 2)
    for ended in step.ended.values():
        for name, value in before.state["side"].items():
            at = low_rank.axis(name) or 0
            assert torch.equal(ended[name].narrow(at, 0, value.shape[at]), value)
    assert all(set(update) == {"adapter"} for update in step.updates.values())


def test_one_client_has_nothing_left_out() -> None:
    step = rounds(fedex_lora(), 2, sizes={"a": 3})[-1]
    assert {low_rank.ranks(step.state["side"], name) for name in step.state["side"]} == {0}
    assert bits(step.served) == bits(step.ended["a"])


def test_equal_clients_are_a_fixed_point() -> None:
    step = rounds(fedex_lora(), 2, same=True)[-1]
    assert all(torch.equal(v, step.ended["a"][n]) for n, v in step.served.items())


def test_a_bounded_side_is_the_best_of_its_rank() -> None:
    whole, cut = rounds(fedex_lora(), 1)[0], rounds(fedex_lora(max_rank=2), 1)[0]
    for layer, value in cases.dense(whole.state["side"]).items():
        left = torch.linalg.svdvals(value)[2:].square().sum().sqrt()
        lost = (cases.dense(cut.state["side"])[layer] - value).norm()
        assert float(lost) == pytest.approx(float(left), rel=1e-5)
    assert cases.error(cut) > 1e-3


# --- planted bugs


def transposed(clients: list[Tensors], whole: Tensors, parts: list[float]) -> Tensors:
    """Turn the residual of square layers around, as the released code does for all: no shape tells."""
    side, turned = residual(clients, whole, parts), {}
    for b, a in low_rank.pairs(side):
        square = side[b].shape[0] == side[a].shape[1]
        turned[b], turned[a] = (side[a].T, side[b].T) if square else (side[b], side[a])
    return turned


def uniform(clients: list[Tensors], whole: Tensors, parts: list[float]) -> Tensors:
    return residual(clients, whole, [1 / len(parts)] * len(parts))


def weighted_twice(clients: list[Tensors], whole: Tensors, parts: list[float]) -> Tensors:
    return low_rank.stacked([low_rank.single(residual(clients, whole, parts))], [parts[0]])


def scaled(clients: list[Tensors], whole: Tensors, parts: list[float]) -> Tensors:
    """Apply alpha/rank here and again in the model."""
    return {n: v * cases.SCALE if low_rank.B in n else v for n, v in residual(clients, whole, parts).items()}


@pytest.mark.parametrize("broken", [transposed, uniform, weighted_twice, scaled])
def test_planted_bugs_are_caught(broken: Callable[..., Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "residual", broken)
    assert cases.error(rounds(fedex_lora(), 1)[0]) > 1e-3


def test_a_side_that_is_trained_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "frozen", lambda side: None)
    assert max(cases.error(step) for step in rounds(fedex_lora(), 2)) > 1e-3


@pytest.mark.parametrize("changes", [{"weight_decay": 0.1}, {"mixed_ranks": True}, {"moments": "keep"}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    fedex_lora().check(cases.facts())
    with pytest.raises(JobError, match="fedex_lora"):
        fedex_lora().check(cases.facts(**changes))


def test_a_client_without_a_layer_is_named() -> None:
    state = fedex_lora().init(cases.first())
    short = {n: v for n, v in cases.first().items() if "y.q_proj.lora_A" not in n}
    with pytest.raises(RunError, match=r"client b: .*y\.q_proj\.lora_A.* is missing"):
        cases.combined(
            fedex_lora(), state, {"a": {"adapter": cases.first()}, "b": {"adapter": short}}, {"a": 1, "b": 1}
        )


def test_the_state_survives_a_stop() -> None:
    """A side of rank 0 is a tensor like any other, in the file as well."""
    from weft.links import wire

    state = fedex_lora().init(cases.first())
    assert bits(wire.unpack(wire.pack(state))) == bits(state)
