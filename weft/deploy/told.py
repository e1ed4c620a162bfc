"""What a site has told of its records, by its own count: a line for each round that it trained with noise of its own.

The coordinator keeps an account too, and could ask for more than it counts; a site's `max_epsilon` goes by this one. It
is `privacy.jsonl` in the site's folder, over all jobs that were joined from there, each line on disk before its noise
is drawn. With `local.dp` a round that is asked again from the same state, with the same records and the same secret,
has the same noise and is counted once. Anything else is counted again, and so is every round of `discrete_noise`, whose
noise goes by the update to the last bit.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from weft import journal
from weft.account import account_of
from weft.core.errors import PolicyError
from weft.core.types import Wire
from weft.job import Job
from weft.privacy import Spent, added, epsilon
from weft.site.recipe import Recipe
from weft.spending import Row, rows_of


@dataclass(frozen=True)
class Cost:
    """What a round of a job tells of one unit at this site, through the noise that sites add."""

    unit: str
    spent: Spent
    discrete: bool = False
    """The noise is whole numbers: RDP alone accounts for it."""


def cost_of(job: Job, recipe: Recipe, wire: Wire, records: int) -> Cost | None:
    """Return what a round costs a site with this many records; None: no noise is added at a site, nothing bounds it.

    Noise that the coordinator adds to the sum is none of a site's: it sees each update before.
    """
    sites = dict.fromkeys(job.sites, records)
    levels = {level.name: level for level in account_of(job, recipe, wire, sites, None).levels}
    for level in (levels.get("record"), levels.get("site")):
        if level and (level.name == "record" or level.discrete):
            return Cost(level.unit, next(iter(level.spent.values())), level.discrete)
    return None


@dataclass
class Told:
    """The lines of one site."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = rows_of(self.path)

    def besides(self, job: str) -> list[Row]:
        """Return what other jobs have cost."""
        return [row for row in self.rows if row["job"] != job]

    def count(self, row: Row, cost: Cost, most: float | None, delta: float) -> None:
        """Write down a round before it is trained; raise PolicyError where it would cost more than `most` in all.

        row: what decides the round's noise: job, round, state, secret and data.
        """
        if not cost.discrete and any(row.items() <= old.items() for old in self.rows):
            return
        spent = cost.spent
        line = {**row, "spent": [spent.noise, spent.rate, spent.steps], "discrete": cost.discrete}
        after = epsilon_of([*self.rows, line], delta) if most is not None else 0.0
        if most is not None and after > most:
            raise PolicyError(
                f"round {row['round']} would bring what this site has told of {cost.unit} to epsilon {after:.4g} at "
                f"delta {delta:g}, and its policy allows max_epsilon: {most:g}"
            )
        journal.append(self.path, line)
        self.rows.append(line)


def epsilon_of(rows: Iterable[Row], delta: float, cost: Cost | None = None, rounds: int = 0) -> float:
    """Return the epsilon of some lines, and of some rounds of a job beside them."""
    rows = list(rows)
    spent = [Spent(*row["spent"]) for row in rows]
    if cost:
        spent += [cost.spent] * rounds
    discrete = any(row["discrete"] for row in rows) or bool(cost and cost.discrete)
    return epsilon(added(spent), delta, discrete).value
