"""median and trimmed_mean: by hand, robust up to their breakdown point, refused beyond it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median as median_of

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.attacks import ATTACKS, CLIENTS, A, attacked, honest, received, turns, within
from tests.algorithms.reference import FACTS, UNIFORM, combined, number
from weft import plugins
from weft.algorithms.fedavg import fedavg
from weft.algorithms.median import median
from weft.algorithms.trimmed_mean import trimmed_mean
from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.core.types import Algorithm, State, Tensors
from weft.testing import toys


def of(algorithm: Algorithm, values: Sequence[float]) -> float:
    return float(combined(algorithm, [number(value) for value in values], number(0.0))["w"])


def test_the_median_by_hand() -> None:
    """The middle of 1 2 3 10 is (2 + 3) / 2, that of 1 3 10 is 3."""
    assert of(median(), [10.0, 1.0, 3.0, 2.0]) == 2.5
    assert of(median(), [10.0, 1.0, 3.0]) == 3.0
    assert of(median(), [7.0]) == 7.0


def test_the_trimmed_mean_by_hand() -> None:
    """Without 1 and 10 the mean of 1 2 4 10 is 3; without two on each side of 1 2 4 6 10 it is 4."""
    assert of(trimmed_mean(trim=1), [10.0, 1.0, 4.0, 2.0]) == 3.0
    assert of(trimmed_mean(trim=2), [10.0, 1.0, 4.0, 2.0, 6.0]) == 4.0


def test_nothing_trimmed_is_the_plain_mean_whatever_the_sizes() -> None:
    adapters = honest(5)
    got = combined(trimmed_mean(trim=0), adapters, received(), weights=[1, 50, 3, 7, 100])
    assert reference.far(got, mean_of(adapters)) < 1e-6


def by_number(adapters: Sequence[Tensors], rule: Callable[[list[float]], float]) -> Tensors:
    """Apply a rule to every number on its own, in Python's floats."""
    stack = trees.stack(adapters)
    columns = {n: v.flatten(1).double().T.tolist() for n, v in stack.items()}
    rows = {n: torch.tensor([rule(column) for column in columns[n]], dtype=torch.float64) for n in stack}
    return {n: row.view(stack[n].shape[1:]) for n, row in rows.items()}


def trimmed(values: list[float], trim: int = 2) -> float:
    inner = sorted(values)[trim : len(values) - trim]
    return sum(inner) / len(inner)


@pytest.mark.parametrize("count", [8, 9])
def test_every_number_is_that_of_the_reference(count: int) -> None:
    adapters = honest(count)
    assert reference.far(combined(median(), adapters, received()), by_number(adapters, median_of)) < 1e-6
    assert reference.far(combined(trimmed_mean(trim=2), adapters, received()), by_number(adapters, trimmed)) < 1e-6


RULES = {"median": lambda byzantine: median(), "trimmed_mean": lambda byzantine: trimmed_mean(trim=byzantine)}


@pytest.mark.parametrize("byzantine", [1, 3, 4])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", RULES)
def test_the_result_stays_within_the_honest_values(name: str, attack: str, byzantine: int) -> None:
    good, everyone = attacked(attack, byzantine)
    assert within(combined(RULES[name](byzantine), everyone, received()), good)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_mean_does_not(attack: str) -> None:
    good, everyone = attacked(attack, 1)
    assert not within(mean_of(everyone), good)


def mean_of(adapters: Sequence[Tensors]) -> Tensors:
    return {n: v.double().mean(0) for n, v in trees.stack(adapters).items()}


@pytest.mark.parametrize("name", RULES)
def test_beyond_the_breakdown_point_it_breaks(name: str) -> None:
    """Five of nine decide; one more than is trimmed does too."""
    good, everyone = attacked("huge", 5)
    assert not within(combined(RULES[name](4), everyone, received()), good)


def test_one_more_than_is_trimmed_breaks_the_trimmed_mean() -> None:
    good, everyone = attacked("huge", 3)
    assert not within(combined(trimmed_mean(trim=2), everyone, received()), good)


def test_rounds_with_a_dishonest_client_still_learn() -> None:
    """Nine toy clients, one of which pulls one tensor to 1e3: only the mean follows it out of the others' targets."""
    clients = {f"c{i}": toys.client(f"c{i}") for i in range(8)}
    targets = trees.stack(client.target for client in clients.values())["n.bias"]
    liar = replace(clients["c0"], target={**clients["c0"].target, "n.bias": torch.full((5,), 1e3)})
    toy = toys.Toy({**clients, "liar": liar}, 9)
    for make, held in ((median, True), (trimmed_mean, True), (fedavg, False)):
        end = reference.ended(make, toy, 25, UNIFORM)["n.bias"]
        inside = (end > targets.min(0).values - 0.05) & (end < targets.max(0).values + 0.05)
        assert bool(inside.all()) == held


def test_it_depends_on_the_gauge_of_the_factors() -> None:
    """Said in the docstring: honest clients in other factors change the median of A and B."""
    adapters = honest(5)
    turned = [*adapters[:3], *(reference.regauged(adapter, turns()[0]) for adapter in adapters[3:])]
    for rule in (median(), trimmed_mean(trim=1)):
        one, other = (toys.effective(combined(rule, rows, received()))["m"] for rows in (adapters, turned))
        assert not torch.allclose(one, other, atol=1e-3)


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(JobError, match="trimmed_mean with trim 3 needs 7 clients a round, and this job has 6: raise"):
        trimmed_mean(trim=3).check(replace(FACTS, per_round=6))
    trimmed_mean(trim=4).check(FACTS)
    with pytest.raises(RunError, match="round 1: 2 replies are too few, the rule needs 3"):
        combined(trimmed_mean(trim=1), honest(2), received())
    with pytest.raises(JobError, match="median needs one rank"):
        median().check(replace(FACTS, mixed_ranks=True))
    median().check(replace(FACTS, per_round=1))
    with pytest.raises(JobError, match="must be a whole number"):
        plugins.parse("algorithm", {"trimmed_mean": 0.2})


def test_a_client_that_sends_other_shapes_is_named() -> None:
    adapters = honest(4)
    adapters[2] = {**adapters[2], A: torch.zeros(3, 6)}
    with pytest.raises(RunError, match=r"round 1: client c2: adapter/m.lora_A.default.weight is \(3, 6\)"):
        combined(median(), adapters, received())
    del adapters[2][A]
    with pytest.raises(RunError, match=r"client c2: .*is missing"):
        combined(median(), adapters, received())


def test_the_round_names_it_before_anything_is_measured() -> None:
    """A tensor that only broadcasts, such as (1,) for (5,), would pass through every formula."""
    toy = toys.Toy({name: toys.client(name) for name in "abc"}, 3)

    def short(update: State) -> State:
        return {"adapter": {**update["adapter"], "n.bias": update["adapter"]["n.bias"][:1]}}

    with pytest.raises(RunError, match=r"round 1: client a: adapter/n\.bias is \(1,\) torch.float32, not \(5,\)"):
        toys.play(lambda: replace(median(), cut=short), UNIFORM, 1, toy=toy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_client_that_sends_no_number_is_named_by_the_round(bad: float) -> None:
    """Before any rule sees it: sorted to an end, a NaN would be trimmed in silence."""
    broken = replace(toys.client("b"), target={n: torch.full(s, bad) for n, s in toys.EFFECTIVE.items()})
    toy = toys.Toy({name: toys.client(name) for name in "acde"} | {"b": broken}, 5)
    for rule in (median, trimmed_mean):
        with pytest.raises(RunError, match=r"round 1: client b: adapter/.* holds a NaN or an infinity"):
            toys.play(rule, UNIFORM, 1, toy=toy)


def test_it_must_see_every_reply() -> None:
    """So a job with secure aggregation refuses it."""
    assert all(rule.combine for rule in (median(), trimmed_mean()))
    assert CLIENTS > 2 * 4


# --- planted mistakes


def with_rule(rule: Callable[[Tensor], Tensor]) -> Algorithm:
    def combine(replies: Sequence, state: dict, tally: object) -> dict:
        stack = trees.stack(reply.update["adapter"] for reply in replies)
        return {"adapter": {n: rule(v) for n, v in stack.items()}}

    return replace(median(), combine=combine)


def lower_middle(values: Tensor) -> Tensor:
    return values.median(dim=0).values


def share_of_all(values: Tensor) -> Tensor:
    """Leave out 0.29 of all on each side, as a part: int(0.29 * 100) is 28 and not 29."""
    count = int(0.29 * len(values))
    return values.sort(dim=0).values[count : len(values) - count].mean(0)


def upper_only(values: Tensor) -> Tensor:
    return values.sort(dim=0).values[: len(values) - 2].mean(0)


def test_the_examples_catch_the_lower_of_the_middle_two() -> None:
    assert of(with_rule(lower_middle), [10.0, 1.0, 3.0, 2.0]) == 2.0
    adapters = honest(8)
    assert reference.far(combined(with_rule(lower_middle), adapters, received()), by_number(adapters, median_of)) > 1e-3


def test_a_count_is_not_a_part() -> None:
    """Of 100 clients, 29 lie; the count 29 is exact, the part 0.29 leaves one of them in."""
    values = [1e6] * 29 + [float(i) for i in range(71)]
    assert of(trimmed_mean(trim=29), values) <= 70
    assert of(with_rule(share_of_all), values) > 1e4


def test_the_attack_catches_trimming_on_one_side() -> None:
    good, everyone = attacked("far away", 2)
    assert not within(combined(with_rule(upper_only), everyone, received()), good)
    assert within(combined(trimmed_mean(trim=2), everyone, received()), good)
