"""The paired bootstrap, against numbers that can be worked out by hand."""

from typing import Any

import numpy as np
import pytest

from weft.suite.bootstrap import difference, scores_of_draws


def rows(*values: float) -> dict[str, Any]:
    return {"all": [{"loss": value, "count": 1.0} for value in values]}


def mean(sums: dict[str, float]) -> float:
    return sums["loss"] / sums["count"]


def test_a_constant_shift_is_certain() -> None:
    """Every example is better by 0.5, so every draw is: the interval is the point, and p is 2/(1000+1)."""
    values = np.random.default_rng(0).normal(size=50)
    draws = scores_of_draws({"a": {0: rows(*values)}, "b": {0: rows(*(values + 0.5))}}, mean, 1000)
    found = difference(draws["b"], draws["a"], 0.95)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    assert found.p == pytest.approx(2 / 1001)


def test_rows_that_are_alike_are_not_told_apart() -> None:
    draws = scores_of_draws({"a": {0: rows(1, 2, 3)}, "b": {0: rows(1, 2, 3)}}, mean, 100)
    assert difference(draws["b"], draws["a"], 0.95).p == 1.0


def test_the_spread_is_that_of_the_mean() -> None:
    """The standard deviation of a mean of n is that of the values over the root of n: 1/sqrt(400) = 0.05."""
    values = np.random.default_rng(1).normal(size=400)
    draws = scores_of_draws({"a": {0: rows(*values)}}, mean, 2000)["a"]
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.1)


def test_pairing_is_what_makes_it_sharp() -> None:
    """The same examples in another order are not the same examples: the interval of the difference grows wide."""
    random = np.random.default_rng(2)
    values = random.normal(size=200)
    better = values + 0.05
    kept = {"a": {0: rows(*values)}, "b": {0: rows(*better)}}
    mixed = {"a": {0: rows(*values)}, "b": {0: rows(*random.permutation(better))}}
    widths = []
    for given in (kept, mixed):
        draws = scores_of_draws(given, mean, 500)
        found = difference(draws["b"], draws["a"], 0.95)
        widths.append(found.high - found.low)
    assert widths[0] < 0.01 < 0.1 < widths[1]


def test_seeds_are_drawn_as_well() -> None:
    """Two seeds that score 0 and 1 on every example: a draw takes one of them twice half the time, so 0, .5 or 1."""
    draws = scores_of_draws({"a": {0: rows(0, 0, 0), 1: rows(1, 1, 1)}}, mean, 1000)["a"]
    assert set(draws.round(9)) == {0.0, 0.5, 1.0}
    assert abs((draws == 0.5).mean() - 0.5) < 0.06


def test_rows_over_other_examples_are_left_out() -> None:
    draws = scores_of_draws({"a": {0: rows(1, 2)}, "b": {0: rows(1, 2, 3)}, "c": {1: rows(1, 2)}}, mean, 100)
    assert set(draws) == {"a"}
