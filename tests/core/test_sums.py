"""The exact sum: against rational numbers, in any order, and refused where it could not be exact."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from weft.core.errors import RunError
from weft.core.sums import LIMIT, MOST_WEIGHT, Sum
from weft.core.types import State

UNIT = 2**80  # a sum counts in multiples of 1 / UNIT


def state(*values: float) -> State:
    return {"adapter": {"w": torch.tensor(values)}}


def summed(*rows: tuple[State, int]) -> Sum:
    total = Sum()
    for row, weight in rows:
        total.add(row, weight)
    return total


def mean(total: Sum) -> Tensor:
    return total.divided(total.weight)["adapter"]["w"]


def held(total: Sum) -> list[Fraction]:
    """Return what the limbs of a one-dimensional sum are, as rational numbers."""
    high, middle, low = total.limbs["adapter"]["w"].tolist()
    return [Fraction(h * 2**64 + m * 2**32 + n, UNIT) for h, m, n in zip(high, middle, low, strict=True)]


def anything(seed: int, count: int = 200) -> Tensor:
    """Return float32 of both signs over the whole exact range, 2^-56 to 2^15, and zeros."""
    draw = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-56, 15, (count,), generator=draw).float()
    values = (1 + torch.rand(count, generator=draw)).clamp(max=1.999) * 2**exponents
    signs = torch.randint(0, 2, (count,), generator=draw) * 2 - 1
    return values * signs * (torch.rand(count, generator=draw) > 0.05)


def test_weighted_mean_by_hand() -> None:
    """(1 * 2 + 3 * 6) / 4 = 5 and (1 * -1 + 3 * 1) / 4 = 0.5."""
    assert mean(summed((state(2.0, -1.0), 1), (state(6.0, 1.0), 3))).tolist() == [5.0, 0.5]


def test_a_third_is_rounded_once() -> None:
    """(1 + 0 + 0) / 3 in float32 is 11184811 / 2^25."""
    assert mean(summed((state(1.0), 1), (state(0.0), 2))).tolist() == [11184811 / 2**25]


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_is_the_rational_sum(seed: int) -> None:
    rows = [(anything(10 * seed + i), weight) for i, weight in enumerate((1, 7, 1000, 2**20))]
    total = summed(*(({"adapter": {"w": row}}, weight) for row, weight in rows))
    expected = [sum(Fraction(row[i].item()) * weight for row, weight in rows) for i in range(200)]
    assert held(total) == expected
    for found, exact in zip(mean(total).tolist(), expected, strict=True):
        true = exact / total.weight
        assert abs(Fraction(found) - true) <= abs(true) * Fraction(1, 2**24) + Fraction(1, UNIT)


@pytest.mark.parametrize("value", [2.0**-56, -(2.0**-56), 2.0**-56 * (1 + 2.0**-23), 32767.998046875, -32767.998046875])
def test_the_edges_of_the_exact_range(value: float) -> None:
    assert held(summed((state(value), 3))) == [3 * Fraction(value)]
    assert mean(summed((state(value), 3))).tolist() == [value]


@pytest.mark.parametrize(
    ("value", "units"),
    [(2.0**-81, 0), (2.0**-80, 1), (1.5 * 2.0**-80, 2), (2.5 * 2.0**-80, 2), (-(2.0**-80), -1), (1e-30, 0)],
)
def test_what_is_smaller_is_rounded_to_a_multiple_of_the_unit(value: float, units: int) -> None:
    """Half a unit goes to the even multiple: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2."""
    assert held(summed((state(value), 1))) == [Fraction(units, UNIT)]


@settings(max_examples=50, deadline=None)
@given(weights=some.lists(some.integers(1, 10**6), min_size=1, max_size=6), seed=some.integers(0, 10**6))
def test_equal_inputs_come_back(weights: list[int], seed: int) -> None:
    row = anything(seed, 20)
    total = summed(*(({"adapter": {"w": row}}, weight) for weight in weights))
    assert torch.equal(mean(total), row)


def test_no_order_and_no_grouping_changes_a_bit() -> None:
    """The negative control: a running float32 sum of the same numbers does depend on the order."""
    rows = [({"adapter": {"w": anything(seed)}}, seed + 1) for seed in range(9)]
    forth, back = summed(*rows), summed(*rows[::-1])
    parts = [summed(*rows[:4]), summed(*rows[4:5]), summed(*rows[5:])]
    merged = Sum()
    for part in parts[::-1]:
        merged.merge(part)
    assert torch.equal(mean(forth), mean(back))
    assert torch.equal(mean(forth), mean(merged))
    floats = [sum(row["adapter"]["w"] * weight for row, weight in order) for order in (rows, rows[::-1])]
    assert not torch.equal(floats[0], floats[1])  # type: ignore[arg-type]


def test_a_merged_part_stays_as_it_was() -> None:
    part, total = summed((state(1.0), 1)), Sum()
    total.merge(part)
    total.add(state(2.0), 1)
    assert mean(part).tolist() == [1.0]
    assert mean(total).tolist() == [1.5]


@pytest.mark.parametrize("value", [LIMIT, -LIMIT, 1e30, float("nan"), float("inf")])
def test_a_value_that_does_not_fit_is_refused_and_leaves_the_sum(value: float) -> None:
    total = summed((state(1.0, 1.0), 1))
    with pytest.raises(RunError, match="adapter/w holds a value that is not below 32768 in magnitude"):
        total.add(state(0.0, value), 1)
    assert mean(total).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weight", [0, -1, MOST_WEIGHT, MOST_WEIGHT - 5])
def test_a_weight_that_does_not_fit_is_refused(weight: int) -> None:
    total = summed((state(1.0), 5))
    with pytest.raises(RunError, match=f"a weight of {weight} does not fit"):
        total.add(state(1.0), weight)
    assert total.weight == 5


def test_the_largest_sum_does_not_overflow() -> None:
    most = 32767.998046875
    total = summed((state(most, -most), MOST_WEIGHT - 6), (state(most, -most), 5))
    assert mean(total).tolist() == [most, -most]


def test_merged_weights_that_do_not_fit_are_refused() -> None:
    total = summed((state(1.0), MOST_WEIGHT // 2))
    with pytest.raises(RunError, match="do not fit"):
        total.merge(summed((state(1.0), MOST_WEIGHT // 2)))
    assert total.weight == MOST_WEIGHT // 2


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (state(1.0), "adapter/w"),
        ({"adapter": {"w": torch.ones(2), "v": torch.ones(2)}}, "adapter/v"),
        ({}, "adapter/w"),
        ({"delta": {"w": torch.ones(2)}}, "adapter/w"),
    ],
)
def test_a_state_of_another_shape_is_refused_and_not_broadcast(other: State, name: str) -> None:
    with pytest.raises(RunError, match=f"{name} is not in all updates alike"):
        summed((state(1.0, 2.0), 1), (other, 1))


def test_the_result_is_in_name_order() -> None:
    total = summed(({"b": {"z": torch.ones(1), "a": torch.ones(1)}, "a": {}}, 1))
    assert [(part, list(tree)) for part, tree in total.divided(1).items()] == [("a", []), ("b", ["a", "z"])]
