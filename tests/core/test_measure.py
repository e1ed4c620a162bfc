"""The aggregation error: by hand on rank 1, and near the dense value where it is estimated."""

import pytest
import torch
from torch import Tensor

from weft.core import measure
from weft.core.measure import COLUMNS, MeanUpdate, Spread
from weft.core.types import Products


def one(left: float, right: float) -> Products:
    return {"m": (torch.tensor([[left]]), torch.tensor([[right]]))}


def error(updates: list[tuple[Products, int]], result: Products) -> float:
    running = MeanUpdate()
    for products, weight in updates:
        running.add(products, weight)
    return running.error(result)


def test_two_clients_by_hand() -> None:
    """B = 1, 3 and A = 2, 4: the mean of the products is (2 + 12) / 2 = 7, the product of the means 2 * 3 = 6,
    the error |6 - 7| / 7.
    """
    assert error([(one(1, 2), 1), (one(3, 4), 1)], one(2, 3)) == pytest.approx(1 / 7, rel=1e-12)


def test_weights_count() -> None:
    """With weights 1 and 3 the mean is (2 + 36) / 4 = 9.5; the factors' means are 2.5 and 3.5: 8.75."""
    found = error([(one(1, 2), 1), (one(3, 4), 3)], one(2.5, 3.5))
    assert found == pytest.approx(0.75 / 9.5, rel=1e-12)


def test_a_common_factor_has_no_error() -> None:
    """A = 4 for both: the mean of the products is (4 + 12) / 2 = 8 = 2 * 4."""
    assert error([(one(1, 4), 1), (one(3, 4), 1)], one(2, 4)) == 0.0


def test_nothing_moved_is_no_error_and_something_from_nothing_is() -> None:
    assert error([(one(0, 2), 1), (one(0, 4), 1)], one(0, 3)) == 0.0
    assert error([(one(0, 2), 1)], one(2, 3)) == 6.0


def test_modules_count_together() -> None:
    """Errors 1 and 0 beside means 7 and 24: 1 / sqrt(49 + 576) = 1 / 25."""
    first, second = one(1, 2) | {"n": one(24, 1)["m"]}, one(3, 4) | {"n": one(24, 1)["m"]}
    assert error([(first, 1), (second, 1)], one(2, 3) | {"n": one(24, 1)["m"]}) == pytest.approx(1 / 25)


def factors(inputs: int, seed: int, rank: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)
    left = torch.randn(40, rank, generator=shared) + 0.5 * torch.randn(40, rank, generator=draw)
    right = torch.randn(rank, inputs, generator=shared) + 0.5 * torch.randn(rank, inputs, generator=draw)
    return left, right


def dense_error(clients: list[tuple[Tensor, Tensor]], result: tuple[Tensor, Tensor]) -> float:
    mean = torch.stack([left.double() @ right.double() for left, right in clients]).mean(0)
    return float((result[0].double() @ result[1].double() - mean).norm() / mean.norm())


@pytest.mark.parametrize(("inputs", "tolerance"), [(COLUMNS, 1e-9), (65, 0.15), (300, 0.15), (2048, 0.15)])
def test_the_error_is_that_of_dense_matrices(inputs: int, tolerance: float) -> None:
    for trial in range(5):
        clients = [factors(inputs, 10 * trial + k) for k in range(6)]
        result = tuple(torch.stack([client[side] for client in clients]).mean(0) for side in (0, 1))
        found = error([({"m": client}, 1) for client in clients], {"m": (result[0], result[1])})
        assert found == pytest.approx(dense_error(clients, (result[0], result[1])), rel=tolerance)


def test_the_order_of_the_replies_hardly_matters() -> None:
    """Unlike the sum this is floating point, in float64."""
    updates = [({"m": factors(300, k)}, k + 1) for k in range(6)]
    result = {"m": factors(300, 7)}
    assert error(updates, result) == pytest.approx(error(updates[::-1], result), rel=1e-12)


def test_the_spread_of_clients_by_hand() -> None:
    """Updates (3, 4) and (-4, 3): norms 5, mean (-0.5, 3.5), each sqrt(12.5) from it; they are at right angles."""
    spread = Spread()
    spread.add("a", {"w": torch.tensor([3.0]), "v": torch.tensor([4.0])})
    spread.add("b", {"w": torch.tensor([-4.0]), "v": torch.tensor([3.0])})
    assert spread.norms == {"a": 5.0, "b": 5.0}
    assert spread.drift() == pytest.approx(12.5**0.5)
    assert spread.cosine() == pytest.approx(0.0, abs=1e-12)
    spread.add("c", {"w": torch.tensor([0.0]), "v": torch.tensor([0.0])})
    assert spread.cosine() == pytest.approx(0.0, abs=1e-12)


def test_one_client_has_no_company_to_measure() -> None:
    spread = Spread()
    assert (spread.drift(), spread.cosine()) == (None, None)
    spread.add("a", {"w": torch.tensor([3.0])})
    assert (spread.drift(), spread.cosine()) == (0.0, None)


def test_a_projection_is_drawn_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two of 100 x 64 doubles: the third makes room, and what is drawn again is the same."""
    monkeypatch.setattr(measure, "KEPT", 2 * 100 * 64 * 8)
    monkeypatch.setattr(measure, "_drawn", {})
    first = measure._projection("a", 100)
    assert measure._projection("a", 100) is first
    measure._projection("b", 100)
    measure._projection("c", 100)
    assert list(measure._drawn) == [("c", 100)]
    assert torch.equal(measure._projection("a", 100), first)
    assert not torch.equal(measure._projection("b", 100), first)
