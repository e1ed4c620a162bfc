"""norm_bound: shortened updates by hand, against a reference, on dW whatever the factors, and a bound for liars."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.attacks import attacked, beyond, honest, received, turns
from tests.algorithms.reference import FACTS, MEAN, combined
from weft.algorithms import norm_bound as file
from weft.algorithms.fedavg import fedavg
from weft.algorithms.norm_bound import norm_bound
from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.core.types import Algorithm, Tensors
from weft.testing import toys


def of(updates: Sequence[Sequence[float]], weights: Sequence[int] = (), start: float = 0.0) -> list[float]:
    rows = [{"w": torch.tensor(update) + start} for update in updates]
    return (combined(norm_bound(norm=1.0), rows, {"w": torch.full((2,), start)}, weights)["w"] - start).tolist()


def test_shortened_by_hand() -> None:
    """Norm 1. (3, 4) has length 5 and becomes (0.6, 0.8); (0.3, 0.4) stays. The mean is (0.45, 0.6); with weights 1
    and 3 it is ((0.6 + 0.9) / 4, (0.8 + 1.2) / 4).
    """
    assert of([[3.0, 4.0], [0.3, 0.4]]) == pytest.approx([0.45, 0.6])
    assert of([[3.0, 4.0], [0.3, 0.4]], [1, 3]) == pytest.approx([0.375, 0.5])
    assert of([[3.0, 4.0], [0.3, 0.4]], start=8.0) == pytest.approx([0.45, 0.6], abs=1e-6)


def test_a_client_that_did_not_move_counts_as_zero() -> None:
    assert of([[0.0, 0.0], [3.0, 4.0]]) == pytest.approx([0.3, 0.4])
    assert of([[0.0, 0.0]]) == [0.0, 0.0]


def dense(adapter: Tensors) -> Tensors:
    return toys.effective(reference.wide(adapter))


def bounded(rows: Sequence[Tensors], norm: float, weights: Sequence[int] = ()) -> Tensors:
    """Return the mean of the shortened dense updates, float64, of any rank."""
    counts = weights or [1] * len(rows)
    start, total = dense(received()), dense(received())
    for row, count in zip(rows, counts, strict=True):
        change = trees.subtract(dense(row), start)
        total = trees.add(total, change, min(1.0, norm / trees.norm(change)) * count / sum(counts))
    return total


def best(matrix: Tensor, rank: int = 2) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def far(make: Callable[[], Algorithm], norm: float = 0.5, rows: Sequence[Tensors] = ()) -> float:
    """Return the distance of the result from the reference, the layer cut to its rank."""
    rows, weights = rows or honest(5), [1, 2, 3, 1, 2]
    expected = bounded(rows, norm, weights)
    return reference.far(dense(combined(make(), rows, received(), weights)), {**expected, "m": best(expected["m"])})


@pytest.mark.parametrize("norm", [0.1, 0.5, 0.9, 100.0])
def test_the_result_is_that_of_the_reference(norm: float) -> None:
    assert far(lambda: norm_bound(norm=norm), norm) < 1e-5
    assert far(fedavg_of_all, 0.5) > 1e-2


def fedavg_of_all() -> Algorithm:
    return norm_bound(norm=1e9)


def test_where_none_is_long_plain_tensors_are_those_of_fedavg() -> None:
    one, other = (toys.play(make, MEAN, 1, toy=toys.toy()) for make in (fedavg, lambda: norm_bound(norm=1e3)))
    for name in ("n.bias", "n.weight"):
        assert torch.allclose(one.used["a"][name], other.used["a"][name], atol=1e-6)


@pytest.mark.parametrize("byzantine", [1, 3])
@pytest.mark.parametrize("attack", ["huge", "sign-flipped", "scaled", "far away"])
def test_liars_move_the_mean_by_no_more_than_their_share(attack: str, byzantine: int) -> None:
    """F of 9 instead of standing still: at most f / 9 norm, of the mean whose rank is then cut; the control is a plain
    mean.
    """
    good, everyone = attacked(attack, byzantine)
    result = combined(norm_bound(norm=2.0), everyone, received())
    still = combined(norm_bound(norm=2.0), [received()] * byzantine + good, received())
    plain = {name: value for name, value in trees.subtract(dense(result), dense(still)).items() if name != "m"}
    assert trees.norm(plain) <= 2.0 * byzantine / 9 + 1e-5
    assert beyond(result, good) < 2.0 * byzantine / 9 / 0.05
    assert beyond({n: v.double().mean(0) for n, v in trees.stack(everyone).items()}, good) > 3.0


@pytest.mark.parametrize("turn", turns())
def test_an_honest_client_in_another_gauge_is_neither_shortened_nor_harmful(turn: Tensor) -> None:
    """(B R, R^-1 A) is the same update; the negative control measures and averages the factors."""
    rows = honest(5)
    turned = [reference.regauged(row, turn) if i % 2 else row for i, row in enumerate(rows)]
    longest = max(trees.norm(trees.subtract(dense(row), dense(received()))) for row in rows)
    one, other = (combined(norm_bound(norm=1.01 * longest), pack, received()) for pack in (rows, turned))
    for part, value in dense(one).items():
        assert torch.allclose(value, dense(other)[part], atol=1e-3)
    lengths = [trees.norm(trees.subtract(row, received())) for row in turned]
    assert max(lengths) > 1.5 * longest or float((turn - torch.eye(2)).norm()) < 0.1


def test_what_it_refuses() -> None:
    with pytest.raises(JobError, match="norm_bound needs one rank"):
        norm_bound(norm=1.0).check(replace(FACTS, mixed_ranks=True))
    assert norm_bound(norm=1.0).combine
    rows = honest(2)
    del rows[1]["n.bias"]
    with pytest.raises(RunError, match=r"client c1: adapter/n\.bias is missing"):
        combined(norm_bound(norm=1.0), rows, received())


# --- planted mistakes


def test_the_reference_catches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of the weights and not of their change; the root of the length."""
    plain, nowhere = file.gram, trees.zeros(received())
    for broken in (lambda rows, start: plain(rows, nowhere), lambda rows, start: plain(rows, start).sqrt()):
        monkeypatch.setattr(file, "gram", broken)
        assert far(lambda: norm_bound(norm=0.5)) > 1e-3
