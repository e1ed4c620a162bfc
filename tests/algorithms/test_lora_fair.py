"""lora_fair: B moved to the least-squares fit of the mean of the products."""

from collections.abc import Callable

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms import lora_fair as module
from weft.algorithms.fedavg import fedavg
from weft.algorithms.lora_fair import lora_fair
from weft.core import low_rank
from weft.core.errors import JobError
from weft.core.types import Algorithm, Tensors


def test_by_hand() -> None:
    """B A is 1 * 1 and 3 * 5: means 2 and 3, R = 8 - 6 = 2, strength 1: X = 2 * 3 / (9 + 1) = 0.6, so B = 2.6."""
    updates = {"a": {"adapter": cases.pair([[1.0]], [[1.0]])}, "b": {"adapter": cases.pair([[3.0]], [[5.0]])}}
    state = lora_fair().init(cases.pair([[0.0]], [[1.0]]))
    after = cases.combined(lora_fair(strength=1.0), state, updates, {"a": 1, "b": 1})["adapter"]
    assert cases.flat(after, "B") + cases.flat(after, "A") == [2.6, 3.0]


def second(algorithm: Algorithm) -> cases.Step:
    """Return a round in which the clients' factors differ."""
    return cases.one_round(algorithm, algorithm.init(cases.first(begun=True)))


@pytest.mark.parametrize("strength", [1e-6, 0.01, 1.0, 30.0])
def test_it_is_the_dense_ridge_regression(strength: float) -> None:
    """Against torch.linalg.lstsq on [A, sqrt(strength) I] in float64."""
    step = second(lora_fair(strength))
    plain = second(fedavg())
    for b, a in low_rank.pairs(step.served):
        assert torch.equal(step.served[a], plain.served[a])
        layer = b.split(".lora_B")[0]
        right, left = plain.served[a].double(), plain.served[b].double()
        residual = cases.mean_dense(step.ended)[layer] / cases.SCALE - left @ right
        tall = torch.cat([right.T, strength**0.5 * torch.eye(4, dtype=torch.float64)])
        wide = torch.cat([residual.T, torch.zeros(4, len(left), dtype=torch.float64)])
        wanted = left + torch.linalg.lstsq(tall, wide, driver="gelsd").solution.T
        assert torch.allclose(step.served[b].double(), wanted, atol=1e-5)
    assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())


def test_it_is_nearer_than_fedavg_and_with_a_large_strength_fedavg() -> None:
    errors = [cases.error(second(lora_fair(strength))) for strength in (1e-8, 0.01, 1.0, 100.0)]
    plain = cases.error(second(fedavg()))
    assert errors == sorted(errors)
    assert errors[-1] < plain
    assert cases.error(second(lora_fair(1e9))) == pytest.approx(plain, rel=1e-5)
    assert cases.journal_error(second(lora_fair())) == pytest.approx(errors[1], rel=1e-4)


def test_what_is_left_is_at_right_angles_to_a() -> None:
    step = second(lora_fair(1e-9))
    for _, a in low_rank.pairs(step.served):
        layer = a.split(".lora_A")[0]
        left = cases.mean_dense(step.ended)[layer] - cases.dense(step.served)[layer]
        assert float((left @ step.served[a].double().T).norm()) < 1e-4


def test_clients_with_one_a_are_exact() -> None:
    one = cases.first(begun=True)
    other = {name: value * 3 if low_rank.B in name else value for name, value in one.items()}
    after = cases.combined(
        lora_fair(), lora_fair().init(one), {"a": {"adapter": one}, "b": {"adapter": other}}, {"a": 3, "b": 1}
    )
    wanted = cases.mean_dense({"a": one, "b": other}, {"a": 3, "b": 1})
    assert cases.distance(cases.dense(after["adapter"]), wanted) < 1e-6


def test_equal_clients_are_a_fixed_point() -> None:
    step = cases.one_round(lora_fair(), lora_fair().init(cases.first(begun=True)), same=True)
    assert all(torch.allclose(v, step.ended["a"][n], atol=1e-6) for n, v in step.served.items())


def with_scale(clients: list[Tensors], parts: list[float]) -> Tensors:
    """The planted bug: the target has the model's scale and B A has not."""
    return low_rank_stacked(clients, [part * cases.SCALE for part in parts])


def uniform(clients: list[Tensors], parts: list[float]) -> Tensors:
    return low_rank_stacked(clients, [1 / len(parts)] * len(parts))


low_rank_stacked: Callable[..., Tensors] = low_rank.stacked


@pytest.mark.parametrize("broken", [with_scale, uniform])
def test_planted_bugs_are_caught(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.low_rank, "stacked", broken)
    with pytest.raises(AssertionError):
        test_it_is_the_dense_ridge_regression(0.01)


@pytest.mark.parametrize("changes", [{"mixed_ranks": True}, {"low_rank": False}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    lora_fair().check(cases.facts(weight_decay=0.1, moments="keep"))
    with pytest.raises(JobError, match="lora_fair"):
        lora_fair().check(cases.facts(**changes))
