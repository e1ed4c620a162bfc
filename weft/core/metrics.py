"""Sums of metrics: those of two examples, clients or sites add up to those of both."""

from collections.abc import Iterable

from weft.core.types import Metrics


def added(rows: Iterable[Metrics]) -> Metrics:
    """Add rows of sums name by name; a name that a row lacks counts nothing there.

    >>> added([{"loss": 2.0, "count": 1.0}, {"loss": 3.0, "count": 1.0, "rouge1": 0.5}])
    {'count': 2.0, 'loss': 5.0, 'rouge1': 0.5}
    """
    total: Metrics = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return {name: total[name] for name in sorted(total)}
