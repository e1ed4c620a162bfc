"""What noise buys: mechanisms that ran, or would run -> epsilon, by Google's dp-accounting.

Every release is a Gaussian mechanism on a Poisson sample, under adding or removing one unit. Epsilon is that of
privacy loss distributions (PLD, rounded up); Renyi differential privacy (RDP) stands beside it as a cross-check,
which must come out higher. Neighbours by addition fit Poisson sampling alone: nothing here takes a fixed batch size.
Discrete Gaussian noise has the RDP of the continuous one (Canonne, Kamath, Steinke 2020, proposition 5 and theorem 14)
and no proven PLD in many dimensions, so it is accounted by RDP alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from weft.core.errors import JobError

GRID = 1e-3  # of the privacy loss; a finer one changes the fourth digit
HUGE = 100.0  # an epsilon by RDP beyond which PLD takes minutes, and says no more


@dataclass(frozen=True, order=True)
class Spent:
    """A Gaussian mechanism on a Poisson sample, some times over."""

    noise: float
    """Standard deviation over the sensitivity."""
    rate: float
    """The chance of each unit to be in a sample; 1: all are."""
    steps: int


@dataclass(frozen=True)
class Epsilon:
    """One guarantee by two accountants."""

    pld: float | None
    """None where it is too large to be worth its time, or not proven."""
    rdp: float

    @property
    def value(self) -> float:
        """Return the tighter of two valid bounds."""
        return self.rdp if self.pld is None else min(self.pld, self.rdp)

    @property
    def accountant(self) -> str:
        """Return where the value comes from."""
        return "RDP" if self.pld is None or self.rdp < self.pld else "PLD"


def added(spent: Sequence[Spent]) -> tuple[Spent, ...]:
    """Return what was spent with the steps of equal mechanisms added up, in order."""
    steps: dict[tuple[float, float], int] = {}
    for one in spent:
        steps[one.noise, one.rate] = steps.get((one.noise, one.rate), 0) + one.steps
    return tuple(Spent(*kind, count) for kind, count in sorted(steps.items()) if count)


@lru_cache(maxsize=4096)
def epsilon(spent: tuple[Spent, ...], delta: float, discrete: bool = False) -> Epsilon:
    """Return the epsilon of all mechanisms together; see `added`. discrete: their noise is whole numbers."""
    dp, pld, rdp = _library()
    if not spent:
        return Epsilon(0.0, 0.0)
    if any(one.noise <= 0 for one in spent):
        return Epsilon(None, float("inf"))
    events = [_event(dp, one) for one in spent]
    with _quiet():
        loose = rdp.RdpAccountant()
        for event in events:
            loose.compose(event)
        by_rdp = float(loose.get_epsilon(delta))
        if discrete or by_rdp > HUGE:
            return Epsilon(None, by_rdp)
        tight = pld.PLDAccountant(value_discretization_interval=GRID)
        for event in events:
            tight.compose(event)
        return Epsilon(float(tight.get_epsilon(delta)), by_rdp)


def _event(dp: Any, spent: Spent) -> Any:
    one = dp.GaussianDpEvent(spent.noise)
    return dp.SelfComposedDpEvent(one if spent.rate >= 1 else dp.PoissonSampledDpEvent(spent.rate, one), spent.steps)


def worst(found: Sequence[tuple[Spent, ...]]) -> list[tuple[Spent, ...]]:
    """Return those that may be the worst: none of the others spends at least as much in every way."""
    kinds = sorted(set(found), key=_amount, reverse=True)
    left: list[tuple[Spent, ...]] = []
    for one in kinds:
        if not any(_covers(other, one) for other in left):
            left.append(one)
    return left


def _amount(spent: tuple[Spent, ...]) -> tuple[float, int]:
    return max((one.rate for one in spent), default=0.0), sum(one.steps for one in spent)


def _covers(more: tuple[Spent, ...], less: tuple[Spent, ...]) -> bool:
    """Tell whether one spends at least what another does; only two of one kind each can be compared."""
    if len(more) != 1 or len(less) != 1:
        return not less
    (a,), (b,) = more, less
    return a.noise <= b.noise and a.rate >= b.rate and a.steps >= b.steps


def _library() -> tuple[Any, Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError:
        raise JobError(
            "privacy: epsilon needs the package dp-accounting; install it with `pip install 'weft-fl[privacy]'`"
        ) from None
    return dp_accounting, pld, rdp


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what RDP says of orders that it leaves out: the minimum is taken over the others."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
