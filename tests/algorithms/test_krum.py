"""krum and multi_krum: by hand, an honest client for up to f of 2 f + 3, whatever the gauge, refused for too few."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.attacks import ATTACKS, CLIENTS, attacked, beyond, honest, received, turns
from tests.algorithms.reference import FACTS, UNIFORM, combined, number
from weft.algorithms import krum as krum_file
from weft.algorithms.effective import gram, mean, squared_distances
from weft.algorithms.fedavg import fedavg
from weft.algorithms.krum import krum, krum_scores
from weft.algorithms.multi_krum import multi_krum
from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.core.types import Algorithm, Tensors
from weft.testing import toys

FIVE = [0.0, 1.0, 2.0, 3.1, 100.0]


def of(algorithm: Algorithm, values: Sequence[float], weights: Sequence[int] = ()) -> float:
    return float(combined(algorithm, [number(value) for value in values], number(0.0), weights)["w"])


def scores(values: Sequence[float], byzantine: int) -> list[float]:
    return krum_scores(squared_distances(gram([number(value) for value in values], number(0.0))), byzantine)


def test_scores_by_hand() -> None:
    """N = 5, f = 1: two squared distances count. 0: 1 + 4; 1: 1 + 1; 2: 1 + 1.21; 3.1: 1.21 + 4.41; 100: far."""
    assert scores(FIVE, 1) == pytest.approx([5.0, 2.0, 2.21, 5.62, 96.9**2 + 98.0**2], rel=1e-5)
    assert of(krum(byzantine=1), FIVE) == 1.0


def test_multi_krum_by_hand() -> None:
    """The best two are 1 and 2, the best three would be 0, 1 and 2; each counts once, whatever size it declares."""
    assert of(multi_krum(byzantine=1), FIVE, [1, 1, 1000, 1, 1]) == 1.5
    assert of(multi_krum(byzantine=1, chosen=1), FIVE) == 1.0
    assert of(multi_krum(byzantine=0, chosen=3), FIVE) == 1.0


def test_distances_are_squared() -> None:
    """Of 0 0 3 5 7 with f = 1 the scores are 9, 9, 4 + 9, 4 + 4 and 4 + 16: the one at 5 wins."""
    assert scores([0.0, 0.0, 3.0, 5.0, 7.0], 1) == [9.0, 9.0, 13.0, 8.0, 20.0]
    assert of(krum(byzantine=1), [0.0, 0.0, 3.0, 5.0, 7.0]) == 5.0


def chosen_in_float64(adapters: Sequence[Tensors], byzantine: int) -> list[int]:
    """Return the clients from the best score on, from dense products and Python's floats."""
    rows = [toys.effective(reference.wide(adapter)) for adapter in adapters]
    far = [[trees.norm(trees.subtract(one, other)) ** 2 for other in rows] for one in rows]
    keys = [sum(sorted(row[:i] + row[i + 1 :])[: len(rows) - byzantine - 2]) for i, row in enumerate(far)]
    return sorted(range(len(rows)), key=keys.__getitem__)


@pytest.mark.parametrize("byzantine", [0, 1, 3])
def test_the_choice_is_that_of_the_reference(byzantine: int) -> None:
    adapters = honest(CLIENTS)
    order = chosen_in_float64(adapters, byzantine)
    got, one = combined(krum(byzantine=byzantine), adapters, received()), adapters[order[0]]
    assert torch.equal(got["n.weight"], one["n.weight"])
    assert torch.allclose(toys.effective(got)["m"], toys.effective(one)["m"], atol=1e-5)
    count = CLIENTS - byzantine - 2
    several = combined(multi_krum(byzantine=byzantine), adapters, received())
    expected = sum(adapters[i]["n.weight"].double() for i in order[:count]) / count
    assert torch.allclose(several["n.weight"].double(), expected, atol=1e-7)


def is_one_of(result: Tensors, adapters: Sequence[Tensors]) -> bool:
    """Tell whether a result is an input: other tensors bit for bit, the product to rounding."""
    return any(
        torch.equal(result["n.weight"], one["n.weight"])
        and torch.equal(result["n.bias"], one["n.bias"])
        and torch.allclose(toys.effective(result)["m"], toys.effective(one)["m"], rtol=1e-5, atol=1e-5)
        for one in adapters
    )


@pytest.mark.parametrize("byzantine", [1, 2, 3])
@pytest.mark.parametrize("attack", ATTACKS)
def test_krum_takes_an_honest_client(attack: str, byzantine: int) -> None:
    good, everyone = attacked(attack, byzantine)
    assert is_one_of(combined(krum(byzantine=byzantine), everyone, received()), good)


@pytest.mark.parametrize("byzantine", [1, 2, 3])
@pytest.mark.parametrize("attack", ATTACKS)
def test_multi_krum_stays_within_the_honest_spread(attack: str, byzantine: int) -> None:
    good, everyone = attacked(attack, byzantine)
    assert beyond(combined(multi_krum(byzantine=byzantine), everyone, received()), good) < 1.0
    plain = {n: v.double().mean(0) for n, v in trees.stack(everyone).items()}
    assert beyond(plain, good) > 3.0


def test_beyond_the_breakdown_point_it_breaks() -> None:
    """Five of nine at one place have four neighbours at distance 0."""
    good, everyone = attacked("huge", 5)
    assert not is_one_of(combined(krum(byzantine=3), everyone, received()), good)


RULES = [krum, multi_krum]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("turn", turns())
def test_honest_clients_in_another_gauge_are_honest(rule: Callable[[], Algorithm], turn: Tensor) -> None:
    """(B R, R^-1 A) is the same update: the result is the same, and no such client is left out for it."""
    good, everyone = attacked("scaled", 1)
    turned = [reference.regauged(one, turn) if i % 2 else one for i, one in enumerate(everyone)]
    one, other = (combined(rule(), rows, received()) for rows in (everyone, turned))
    assert torch.equal(one["n.weight"], other["n.weight"])
    assert torch.allclose(toys.effective(one)["m"], toys.effective(other)["m"], atol=1e-3)
    assert beyond(other, good) < 1.0


def test_rounds_with_a_dishonest_client_still_learn() -> None:
    """Eight clients of unlike targets and one that pulls one tensor to 1e3; only the mean follows it."""
    clients = {f"c{i}": toys.client(f"c{i}") for i in range(8)}
    targets = trees.stack(client.target for client in clients.values())["n.bias"]
    liar = replace(clients["c0"], target={**clients["c0"].target, "n.bias": torch.full((5,), 1e3)})
    toy = toys.Toy({**clients, "liar": liar}, 9)
    for make, held in ((krum, True), (multi_krum, True), (fedavg, False)):
        end = reference.ended(make, toy, 25, UNIFORM)["n.bias"]
        inside = (end > targets.min(0).values - 0.1) & (end < targets.max(0).values + 0.1)
        assert bool(inside.all()) == held


def test_too_few_clients_are_refused() -> None:
    """N >= 2 f + 3, and m <= n - f - 2."""
    with pytest.raises(JobError, match="krum with byzantine 1 needs 5 clients a round, and this job has 4: raise"):
        krum(byzantine=1).check(replace(FACTS, per_round=4))
    krum(byzantine=1).check(replace(FACTS, per_round=5))
    krum(byzantine=3).check(FACTS)
    with pytest.raises(JobError, match="multi_krum with byzantine 4 needs 11"):
        multi_krum(byzantine=4).check(FACTS)
    with pytest.raises(JobError, match="multi_krum with chosen 6 needs 10 clients a round"):
        multi_krum(byzantine=2, chosen=6).check(FACTS)
    multi_krum(byzantine=2, chosen=5).check(FACTS)
    for rule in RULES:
        with pytest.raises(RunError, match="4 replies are too few, the rule needs 5"):
            combined(rule(), honest(4), received())
        with pytest.raises(JobError, match="krum needs one rank"):
            rule().check(replace(FACTS, mixed_ranks=True))
        assert rule().combine


def test_a_client_that_sends_no_number_is_named_by_the_round() -> None:
    broken = replace(toys.client("b"), target={n: torch.full(s, torch.nan) for n, s in toys.EFFECTIVE.items()})
    toy = toys.Toy({name: toys.client(name) for name in "acde"} | {"b": broken}, 5)
    for rule in RULES:
        with pytest.raises(RunError, match=r"round 1: client b: adapter/.* holds a NaN or an infinity"):
            toys.play(rule, UNIFORM, 1, toy=toy)


# --- planted mistakes


def neighbours(count: Callable[[int, int], int], power: float = 1.0, own: bool = False) -> Callable[..., list[float]]:
    """Return scores of another number of neighbours, another power of the squared distance, or with oneself."""

    def scored(distances: Tensor, byzantine: int) -> list[float]:
        clients = len(distances)
        others = distances**power + (0 if own else torch.diag(torch.full((clients,), torch.inf)))
        found: list[float] = others.sort(dim=1).values[:, : count(clients, byzantine)].sum(1).tolist()
        return found

    return scored


MISTAKES = {
    "n-f-1": (neighbours(lambda n, f: n - f - 1), FIVE, 1.0),
    "unsquared": (neighbours(lambda n, f: n - f - 2, 0.5), [0.0, 0.0, 3.0, 5.0, 7.0], 5.0),
    "oneself": (neighbours(lambda n, f: n - f - 2, own=True), FIVE, 1.0),
    "right": (neighbours(lambda n, f: n - f - 2), FIVE, 1.0),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_examples_catch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, values, expected = MISTAKES[name]
    monkeypatch.setattr(krum_file, "krum_scores", broken)
    assert (of(krum(byzantine=1), values) == expected) == (name == "right")


def test_distances_between_factors_reject_an_honest_client() -> None:
    """The negative control: measured on A and B, a client in another gauge is the farthest of all."""
    adapters = honest(5)
    adapters[chosen_in_float64(adapters, 1)[0]] = best = reference.regauged(
        adapters[chosen_in_float64(adapters, 1)[0]], turns()[0]
    )
    renamed = [{n.replace("lora_", "plain_"): v for n, v in adapter.items()} for adapter in adapters]
    start = {n.replace("lora_", "plain_"): v for n, v in received().items()}
    assert not torch.equal(combined(krum(), renamed, start)["n.weight"], best["n.weight"])
    assert torch.equal(combined(krum(), adapters, received())["n.weight"], best["n.weight"])


def test_a_mean_by_declared_sizes_is_caught() -> None:
    """Chosen for its honest look, a client that declares 1000 examples would decide: 1.999 and not 1.5."""
    values, sizes = [number(1.0), number(2.0)], torch.tensor([1.0, 1000.0])
    assert float(mean(values, (sizes / sizes.sum()).tolist(), number(0.0))["w"]) == pytest.approx(1.999, abs=1e-3)
    assert float(mean(values, [0.5, 0.5], number(0.0))["w"]) == 1.5
