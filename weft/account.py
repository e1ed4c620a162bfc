"""From a job to its privacy: what each round spends, what holds with it, and what is refused."""

from collections import Counter
from collections.abc import Mapping, Sequence

from weft.core.errors import KeyProblem
from weft.core.meeting import threshold
from weft.core.round import Federation
from weft.core.types import Wire
from weft.job import Job
from weft.privacy import Spent
from weft.site.recipe import Recipe
from weft.spending import Account, Level
from weft.transforms.noise import for_updates

POISSON = "each step draws every unit by chance (Poisson); the sum is divided by the expected batch"
COHORTS = "cohorts come from the public seed, which amplifies nothing: a client spends in each round that it is in"
OUTSIDE = (
    "the number of records of each client is treated as public",
    "test records, scores on them and whatever is chosen by them (rounds, learning rate, stopping early) are outside",
    "baselines train on the same records and are not counted: they are comparisons that nobody releases",
    "a second run on the same records is a second release; epsilons of runs add up",
    "noise is drawn in floating point",
)


def account_of(
    job: Job, recipe: Recipe, wire: Wire, examples: Mapping[str, int], units: Sequence[int] | None
) -> Account:
    """Return what the rounds of a job spend; no level where nothing is noised.

    examples: training examples of each client. units: clients that each unit has records at, where a unit is a column's
    value.
    """
    levels = []
    if recipe.dp:
        levels.append(_records(job, recipe, examples, max(units or [1])))
    missing = _site_lacks(wire)
    if wire.noise and not missing:
        levels.append(_sites(wire, tuple(examples), job.clients.per_round or len(examples)))
    return Account(tuple(levels), job.privacy.delta, job.privacy.epsilon, missing)


def _records(job: Job, recipe: Recipe, examples: Mapping[str, int], shared: int) -> Level:
    dp = recipe.dp
    assert dp is not None
    spent = {
        name: Spent(dp.noise, recipe.expected(count) / count, recipe.steps_of(count))
        for name, count in examples.items()
    }
    conditions = list(OUTSIDE)
    if any(step.name == "weigh" and step.keys["by"] == "examples" for step in job.pipeline):
        conditions.insert(0, "clients are weighed by their numbers of records")
    if shared > 1:
        conditions.insert(0, f"one {dp.unit} has records at up to {shared} clients, and epsilon counts all of them")
    unit = "one record" if dp.unit == "record" else f"all records of a client with one {dp.unit}"
    return Level("record", unit, dp.clip, POISSON, spent, tuple(conditions), shared)


def _sites(wire: Wire, clients: Sequence[str], cohort: int) -> Level:
    assert wire.norm is not None
    conditions = (
        *_where_noise_is(wire, cohort),
        "messages beside the updates, such as losses and numbers of records, are outside",
        *(OUTSIDE[1:-1] if wire.ring else OUTSIDE[1:]),
    )
    spent = dict.fromkeys(clients, Spent(wire.noise, 1.0, 1))
    unit = "one client, all of its records"
    return Level("site", unit, wire.norm, COHORTS, spent, conditions, discrete=wire.ring)


def _where_noise_is(wire: Wire, cohort: int) -> tuple[str, ...]:
    """Say what the noise of a round is that all other conditions speak of."""
    if wire.ring:
        stay = threshold(cohort)
        return (
            f"the noise is that of {stay - wire.colluders} clients' shares: of {cohort} in a round at least {stay} "
            f"stay to the end, or their sum is never opened, and {wire.colluders} of them may know their own; with "
            "more clients there is more noise than is counted here",
            "an absent client counts as one that sends zeros with its share of the noise",
        )
    against = "it holds against whoever sees the sums and not against the server"
    if wire.length is None:
        return (against,)
    return (
        against,
        "the length of clip follows a count of the updates that were short enough, released with noise of "
        f"{wire.spread:g} clients; the updates get noise {for_updates(wire.noise, wire):.4g}, so that both together "
        f"are noise {wire.noise:g}; `clip` is the first length",
    )


def _site_lacks(wire: Wire) -> tuple[str, ...]:
    """Say why noise on the sum of the clients' updates gives no epsilon."""
    if not wire.noise:
        return ()
    lacks = []
    if wire.norm is None:
        lacks.append("no clip bounds what one client adds")
    if not wire.uniform:
        lacks.append("clients are weighed by their sizes, which only they may know, and the mean divides by them")
    return tuple(lacks)


def check(job: Job, account: Account, units: Mapping[str, int], federation: Federation) -> None:
    """Refuse a job whose privacy means nothing, or costs more than its budget; units: of each client."""
    delta, budget = job.privacy.delta, job.privacy.epsilon
    for level in account.levels:
        most = len(units) if level.name == "site" else max(units.values())
        if delta * most >= 1:
            raise KeyProblem(
                ("privacy", "delta"),
                f"{delta:g} is not below one over the {most} units that one is hidden among, so that it could be given "
                f"away; set it to {0.1 / most:.1g} or less",
            )
    if budget is None:
        return
    if not account.levels:
        raise KeyProblem(
            ("privacy", "epsilon"), "nothing in this job adds noise; set local.dp, or leave the budget out"
        )
    for told in account.forecast(federation, job.rounds):
        if told["epsilon"] > budget:
            raise KeyProblem(
                ("privacy", "epsilon"),
                f"{job.rounds} rounds spend epsilon {told['epsilon']:.4g} for {told['unit']} (client {told['worst']}), "
                f"and the budget is {budget:g}; raise the noise, or lower rounds or steps",
            )


def shared_units(clients: Mapping[str, Sequence[int]], units: Sequence[int] | None) -> list[int] | None:
    """Return the number of clients that each unit has records at."""
    if units is None:
        return None
    return list(Counter(unit for chosen in clients.values() for unit in {units[i] for i in chosen}).values())
