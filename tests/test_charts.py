"""Charts as text: what stands at the axes is a number with its unit, whatever the scale."""

import re

import pytest

from weft.report.charts import MARKS, Dot, Frame, dots


@pytest.mark.parametrize(("last", "at_the_bottom"), [(9e3, "8000 B"), (1e6, "100000 B")])
def test_the_bottom_of_a_chart_has_units_on_either_scale(last: float, at_the_bottom: str) -> None:
    """From 8 kB to 9 kB the scale is even, to 1 MB it is that of powers of ten: 10, 30, 100, 300 kB."""
    first, second, *_ = sorted(MARKS)
    found = [Dot("a", first, 8e3, 0.2), Dot("b", second, last, 0.3)]
    drawn = dots(Frame("x", "title", "alt"), found, ("bytes", lambda value: f"{value:.0f} B"), lambda y: f"{y:.2f}")
    texts = re.findall(r">([^<>]+)</text>", drawn)
    assert at_the_bottom in texts
    assert all(re.fullmatch(r"\d+ B|bytes|\d\.\d\d", text) for text in texts)
