"""A lower bound on epsilon from one training run, by guessing which canaries were in it.

Canaries are put in by fair coins; whoever sees the result guesses for some of them. Under (epsilon, delta)-DP a guess
is right with a chance of at most 1 / (1 + exp(-epsilon)), so too many right guesses disprove the epsilon. Steinke, Nasr
and Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv:2305.08846, theorem 5.2 and appendix D. A
bound that stays below the claim proves nothing: it says that this attack did not do better. With m canaries no more
than about log(m) can be proved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the canaries that are guessed, half of them as in and half as out
MOST = 20.0


@dataclass(frozen=True)
class Audit:
    """What an attack on one run proved."""

    epsilon: float
    """No smaller epsilon is true, at the confidence."""
    confidence: float
    canaries: int
    guesses: int
    right: int
    """Of the number of guesses that proved most."""
    auc: float
    """The chance that a canary that was in scores higher than one that was out; 0.5: as good as no attack."""


def chance(epsilon: float, canaries: int, guesses: int, right: int, delta: float) -> float:
    """Return a bound on the chance of so many right guesses under (epsilon, delta)-DP."""
    q = 1 / (1 + math.exp(-epsilon))
    beyond = stats.binom.sf(np.arange(right, -1, -1) - 1, guesses, q)  # P[at least right - i], i from 0
    beta = float(beyond[0])
    alpha = float(((beyond[1:] - beta) / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, beta + 2 * canaries * delta * alpha)


def bound(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Return the largest epsilon that so many right guesses disprove; 0 where they disprove none."""
    low, high = 0.0, MOST
    if chance(low, canaries, guesses, right, delta) >= 1 - confidence:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if chance(middle, canaries, guesses, right, delta) < 1 - confidence else (low, middle)
        )
    return low


def audit(
    scores: Tensor, inside: Tensor, delta: float, confidence: float = 0.95, shares: Sequence[float] = SHARES
) -> Audit:
    """Guess that the canaries of the highest scores were in and those of the lowest out, and return what that proves.

    scores: (canaries,), higher where an attacker believes in a canary more. inside: the coins, (canaries,) bool. The
    confidence is shared among the numbers of guesses that are tried.
    """
    m, order = len(scores), scores.argsort()
    each = 1 - (1 - confidence) / len(shares)
    tried = []
    for half in sorted({max(1, round(m * share / 2)) for share in shares}):
        right = int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())
        tried.append((bound(m, 2 * half, right, delta, each), 2 * half, right))
    epsilon, guesses, right = max(tried)
    return Audit(epsilon, confidence, m, guesses, right, _auc(scores, inside))


def _auc(scores: Tensor, inside: Tensor) -> float:
    """Return the area under the attack's curve, ties by half (Mann and Whitney)."""
    ranks = stats.rankdata(scores.double().numpy())
    positive = int(inside.sum())
    negative = len(inside) - positive
    if not positive or not negative:
        return 0.5
    return float((ranks[inside.numpy()].sum() - positive * (positive + 1) / 2) / (positive * negative))
