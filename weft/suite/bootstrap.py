"""Paired bootstrap: how far apart two rows of a leaderboard would be on other test examples and other seeds.

Each draw takes as many test examples as there are, with replacement, and as many seeds, with replacement: the same
for every row, so that what all rows find hard cancels in a difference. Scores are recomputed from the sums of the
drawn examples (BLEU over its own n-gram counts, perplexity over its own tokens) and averaged over the drawn seeds.
Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13; Koehn (EMNLP 2004) for BLEU. The p of
several comparisons are corrected by Holm (1979).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weft.core.types import Metrics

Rows = Mapping[str, Sequence[Metrics]]
"""Test group -> one row of sums an example."""
Table = np.ndarray


@dataclass(frozen=True)
class Difference:
    """A row's score minus that of the row it is compared with."""

    low: float
    high: float
    p: float
    """Two-sided; `holm` corrects it for the number of comparisons."""


def scores_of_draws(
    rows: Mapping[str, Mapping[int, Rows]],
    score: Callable[[Metrics], float],
    draws: int,
    seed: int = 0,
) -> dict[str, Table]:
    """Return leaderboard row -> its score in each draw, (draws,).

    rows: leaderboard row -> training seed -> its measured examples; only rows with the same examples and seeds as the
    first can be paired, others are left out.
    """
    if not rows:
        return {}
    first = next(iter(rows.values()))
    seeds, shape = sorted(first), _shape(next(iter(first.values())))
    paired = {
        name: found
        for name, found in rows.items()
        if sorted(found) == seeds and all(_shape(one) == shape for one in found.values())
    }
    examples = sum(count for _, count in shape)
    random = np.random.default_rng(seed)
    counts = random.multinomial(examples, np.full(examples, 1 / examples), size=draws).astype(float)
    weights = random.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=draws) / len(seeds)
    return {
        name: sum(weights[:, place] * _scores(found[number], counts, score) for place, number in enumerate(seeds))
        for name, found in paired.items()
    }


def _shape(rows: Rows) -> list[tuple[str, int]]:
    return [(group, len(rows[group])) for group in sorted(rows)]


def _scores(rows: Rows, counts: Table, score: Callable[[Metrics], float]) -> Table:
    """Return the score of each draw, (draws,); counts is (draws, examples)."""
    flat = [row for group in sorted(rows) for row in rows[group]]
    names = sorted({name for row in flat for name in row})
    table = np.array([[row.get(name, 0.0) for name in names] for row in flat])
    sums = counts @ table
    return np.array([score({n: float(v) for n, v in zip(names, line, strict=True)}) for line in sums])


def difference(row: Table, other: Table, confidence: float) -> Difference:
    """Return the interval of `row - other`, and how often chance alone would put it that far from nothing.

    >>> found = difference(np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4), 0.5)
    >>> found.low, found.high, found.p
    (1.75, 3.25, 0.4)
    """
    apart = row - other
    low, high = np.quantile(apart, [(1 - confidence) / 2, (1 + confidence) / 2])
    below, above = int((apart <= 0).sum()), int((apart >= 0).sum())
    return Difference(float(low), float(high), min(1.0, 2 * (min(below, above) + 1) / (len(apart) + 1)))


def holm(found: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number, step by step down from the smallest.

    Three of .01, .04, .03: .01 x 3 = .03; then .03 x 2 = .06; then .04 x 1, but never below the one before.

    >>> {name: round(p, 3) for name, p in holm({"a": 0.01, "b": 0.04, "c": 0.03}).items()}
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected: dict[str, float] = {}
    last = 0.0
    for place, name in enumerate(sorted(found, key=lambda name: found[name])):
        last = max(last, min(1.0, found[name] * (len(found) - place)))
        corrected[name] = last
    return corrected
