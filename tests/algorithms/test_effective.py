"""Inner products and means of effective updates: as the dense ones, whatever the gauge of the factors."""

import pytest
import torch

from tests.algorithms import reference
from tests.algorithms.attacks import A, B, honest, received, turns
from weft.algorithms.effective import gram, mean, squared_distances
from weft.core import trees
from weft.core.types import Tensors
from weft.testing import toys


def dense(adapter: Tensors) -> torch.Tensor:
    """Return dW and all other tensors as one row, float64."""
    return torch.cat([value.flatten() for value in toys.effective(reference.wide(adapter)).values()])


def test_the_gram_matrix_is_the_dense_one() -> None:
    rows = torch.stack([dense(adapter) - dense(received()) for adapter in honest(5)])
    assert torch.allclose(gram(honest(5), received()), rows @ rows.T, rtol=1e-12)


def test_distances_by_hand() -> None:
    """Updates (3, 0), (0, 4) and (0, 0): 9 + 16 = 25, 9 and 16."""
    start = {"w": torch.zeros(2)}
    rows = [{"w": torch.tensor(row)} for row in ([3.0, 0.0], [0.0, 4.0], [0.0, 0.0])]
    assert squared_distances(gram(rows, start)).tolist() == [[0, 25, 9], [25, 0, 16], [9, 16, 0]]


def test_small_differences_of_large_tensors_survive() -> None:
    """|x|^2 + |y|^2 - 2 x y around 1e6 would lose 1e-3 even in float64 if it were taken of the weights themselves."""
    start = {"w": torch.full((4,), 2.0**20)}
    rows = [{"w": start["w"] + shift} for shift in (0.0, 0.25, 0.5)]
    assert squared_distances(gram(rows, start))[0].tolist() == [0.0, 0.25, 1.0]
    narrow = torch.stack([row["w"] for row in rows])
    inner = narrow @ narrow.T
    assert float(inner[0, 0] + inner[1, 1] - 2 * inner[0, 1]) != 0.25


@pytest.mark.parametrize("turn", turns())
def test_no_gauge_changes_an_inner_product(turn: torch.Tensor) -> None:
    adapters = honest(4)
    turned = [reference.regauged(adapters[0], turn), *adapters[1:]]
    assert torch.allclose(gram(adapters, received()), gram(turned, received()), rtol=1e-4, atol=1e-5)


def nearest(adapters: list[Tensors], shares: list[float], rank: int = 2) -> torch.Tensor:
    """Return the best approximation of the mean product by the dense decomposition."""
    total = sum(share * toys.effective(reference.wide(a))["m"] for a, share in zip(adapters, shares, strict=True))
    u, s, vt = torch.linalg.svd(total)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def test_the_mean_is_the_best_of_its_rank() -> None:
    adapters, shares = honest(4), [0.4, 0.3, 0.2, 0.1]
    got = mean(adapters, shares, received())
    assert torch.allclose(toys.effective(reference.wide(got))["m"], nearest(adapters, shares), atol=1e-6)
    plain = sum(share * a["n.weight"].double() for a, share in zip(adapters, shares, strict=True))
    assert torch.allclose(got["n.weight"].double(), plain, atol=1e-7)
    assert list(got) == list(received())
    assert not trees.difference({"a": got}, {"a": received()})


def test_one_adapter_alone_keeps_its_product_and_its_other_bits() -> None:
    (one,) = honest(1)
    got = mean([one], [1.0], received())
    assert torch.equal(got["n.bias"], one["n.bias"])
    assert torch.allclose(toys.effective(got)["m"], toys.effective(one)["m"], atol=1e-6)


@pytest.mark.parametrize("turn", turns())
def test_no_gauge_changes_the_factors(turn: torch.Tensor) -> None:
    """So a client with B / 1e4 and 1e4 A cannot blow up the next round's gradients."""
    adapters = honest(3)
    turned = [reference.regauged(adapters[0], turn), *adapters[1:]]
    one, other = (mean(rows, [1 / 3] * 3, received()) for rows in (adapters, turned))
    for name in (A, B):
        assert torch.allclose(one[name], other[name], atol=1e-3)


def test_an_a_with_rows_at_right_angles_stays_while_only_b_moves() -> None:
    start = received()
    start[A] = torch.linalg.qr(start[A].T.double()).Q.T.float() * 0.5
    moved = {**start, B: start[B] + toys.draw((3, 2), "moved")}
    got = mean([moved], [1.0], start)
    assert torch.allclose(got[A], start[A], atol=1e-6)
    assert torch.allclose(got[B], moved[B], atol=1e-5)


@pytest.mark.parametrize("columns", [0, 1])
def test_ranks_that_are_not_used_yet_can_still_be_learned(columns: int) -> None:
    """B is zero at first: A must not vanish with it, or no gradient would ever reach B."""
    start = toys.adapter()
    used = {**start, B: start[B].clone()}
    used[B][:, :columns] = 1.0
    got = mean([used, start], [0.5, 0.5], start)
    lengths = got[A].norm(dim=1)
    assert torch.allclose(lengths, torch.full((2,), float(start[A].norm()) / 2**0.5), rtol=1e-5)
    assert torch.linalg.matrix_rank(got[A]) == 2
    assert torch.allclose(got[B] @ got[A], 0.5 * used[B] @ used[A], atol=1e-6)


def test_the_mean_of_the_factors_is_spoilt_by_one_gauge() -> None:
    """The negative control: averaging A and B apart, one client in factors of 1e4 decides the product."""
    adapters = honest(3)
    turned = [reference.regauged(adapters[0], turns()[2]), *adapters[1:]]
    plain = {n: v.double().mean(0) for n, v in trees.stack(turned).items()}
    goal = nearest(adapters, [1 / 3] * 3)
    assert float((toys.effective(plain)["m"] - goal).norm()) > 100 * float(goal.norm())
    robust = mean(turned, [1 / 3] * 3, received())
    assert float((toys.effective(reference.wide(robust))["m"] - goal).norm()) < 1e-3 * float(goal.norm())
