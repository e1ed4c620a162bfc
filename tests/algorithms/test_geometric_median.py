"""geometric_median: known points, the condition of a minimum, rotations, gauges, and up to four liars of nine."""

from collections.abc import Sequence
from dataclasses import replace
from math import cos, pi, sin

import pytest
import torch
from torch import Tensor

from tests.algorithms import reference
from tests.algorithms.attacks import ATTACKS, attacked, beyond, honest, received, turns
from tests.algorithms.reference import FACTS, UNIFORM, combined
from weft.algorithms import geometric_median as file
from weft.algorithms.fedavg import fedavg
from weft.algorithms.geometric_median import geometric_median, weiszfeld
from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.testing import toys


def of(points: Sequence[Sequence[float]], weights: Sequence[int] = ()) -> list[float]:
    rows = [{"w": torch.tensor(point)} for point in points]
    return combined(geometric_median(), rows, {"w": torch.zeros(len(points[0]))}, weights)["w"].tolist()


def test_points_that_are_known() -> None:
    """On a line it is the median, of a square the crossing of the diagonals, of an equilateral triangle the centre;
    with a corner of more than 120 degrees it is that corner.
    """
    assert of([[0.0], [1.0], [10.0]]) == pytest.approx([1.0], abs=1e-4)
    assert of([[0.0, 0.0], [4.0, 3.0], [4.0, 0.0], [0.0, 3.0]]) == pytest.approx([2.0, 1.5], abs=1e-5)
    triangle = [[5 + cos(2 * pi * i / 3), 7 + sin(2 * pi * i / 3)] for i in range(3)]
    assert of(triangle) == pytest.approx([5.0, 7.0], abs=1e-5)
    assert of([[-4.0, 1.0], [0.0, 0.0], [4.0, 1.0]]) == pytest.approx([0.0, 0.0], abs=1e-4)
    assert of([[3.0, 4.0]]) == [3.0, 4.0]
    assert of([[3.0, 4.0]] * 4) == pytest.approx([3.0, 4.0])


def test_one_step_by_hand() -> None:
    """Points 0, 1, 5 on a line: from the mean 2 the distances are 2, 1, 3, so the shares are 3/11, 6/11, 2/11."""
    inner = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 5.0], [0.0, 5.0, 25.0]], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "MOST_STEPS", 1)
        assert weiszfeld(inner, 1e-5).tolist() == pytest.approx([3 / 11, 6 / 11, 2 / 11])


def pulls(rows: list[Tensor], result: Tensor) -> float:
    """Return the length of the sum of unit vectors to all points: zero at the minimum of the sum of distances."""
    return float(sum((row - result) / (row - result).norm() for row in rows).norm())


@pytest.mark.parametrize("count", [3, 6, 9])
def test_the_result_is_a_minimum(count: int) -> None:
    rows = [reference.shifted(received(), str(i), 0.3)["n.weight"].double().flatten() for i in range(count)]
    result = combined(geometric_median(), [{"w": row.float()} for row in rows], {"w": torch.zeros(12)})["w"]
    assert pulls(rows, result.double()) < 1e-4
    assert pulls(rows, sum(rows) / count) > 1e-2


def test_a_rotation_of_the_updates_rotates_the_result() -> None:
    turn = torch.linalg.qr(toys.draw((12, 12), "turn").double()).Q
    rows = [toys.draw((12,), "point", i) for i in range(5)]
    start = {"w": torch.zeros(12)}
    plain = combined(geometric_median(), [{"w": row} for row in rows], start)["w"].double()
    turned = combined(geometric_median(), [{"w": (turn @ row.double()).float()} for row in rows], start)["w"].double()
    assert torch.allclose(turn @ plain, turned, atol=1e-5)


def test_sizes_are_ignored() -> None:
    assert of([[0.0], [1.0], [10.0]], [1, 1, 1000]) == of([[0.0], [1.0], [10.0]])


@pytest.mark.parametrize("byzantine", [1, 2, 3, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_it_stays_near_the_honest_clients(attack: str, byzantine: int) -> None:
    """With a part a of liars it is at most 2 (1 - a) / (1 - 2 a) times the honest radius away (Pillutla et al.)."""
    good, everyone = attacked(attack, byzantine)
    part = byzantine / 9
    assert beyond(combined(geometric_median(), everyone, received()), good) < 2 * (1 - part) / (1 - 2 * part)
    assert beyond({n: v.double().mean(0) for n, v in trees.stack(everyone).items()}, good) > 3.0


def test_beyond_one_half_it_breaks() -> None:
    good, everyone = attacked("huge", 5)
    assert beyond(combined(geometric_median(), everyone, received()), good) > 1e3


@pytest.mark.parametrize("turn", turns())
def test_the_gauge_of_the_factors_changes_nothing(turn: Tensor) -> None:
    adapters = honest(5)
    turned = [reference.regauged(one, turn) if i % 2 else one for i, one in enumerate(adapters)]
    one, other = (combined(geometric_median(), rows, received()) for rows in (adapters, turned))
    for part, value in toys.effective(one).items():
        assert torch.allclose(value, toys.effective(other)[part], atol=1e-3)


def test_rounds_with_a_dishonest_client_still_learn() -> None:
    """Eight clients and one that pulls one tensor to 1e3; only the mean follows it out of the others' targets."""
    clients = {f"c{i}": toys.client(f"c{i}") for i in range(8)}
    targets = trees.stack(client.target for client in clients.values())["n.bias"]
    liar = replace(clients["c0"], target={**clients["c0"].target, "n.bias": torch.full((5,), 1e3)})
    toy = toys.Toy({**clients, "liar": liar}, 9)
    for make, held in ((geometric_median, True), (fedavg, False)):
        end = reference.ended(make, toy, 25, UNIFORM)["n.bias"]
        inside = (end > targets.min(0).values - 0.1) & (end < targets.max(0).values + 0.1)
        assert bool(inside.all()) == held


def test_what_it_refuses() -> None:
    with pytest.raises(JobError, match="geometric_median needs one rank"):
        geometric_median().check(replace(FACTS, mixed_ranks=True))
    geometric_median().check(FACTS)
    assert geometric_median().combine
    broken = replace(toys.client("b"), target={n: torch.full(s, torch.nan) for n, s in toys.EFFECTIVE.items()})
    toy = toys.Toy({name: toys.client(name) for name in "acde"} | {"b": broken}, 5)
    with pytest.raises(RunError, match=r"round 1: client b: adapter/.* holds a NaN or an infinity"):
        toys.play(geometric_median, UNIFORM, 1, toy=toy)


# --- planted mistakes


def test_the_attack_catches_four_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step multiplies the odds of 4 liars in 9 by 4/5 only: after four, an attack of 1e6 is still one of 1e5."""
    monkeypatch.setattr(file, "MOST_STEPS", 4)
    good, everyone = attacked("huge", 4)
    assert beyond(combined(geometric_median(), everyone, received()), good) > 1e3


def squared_instead(inner: Tensor, smoothing: float) -> Tensor:
    """Minimise the sum of squared distances: the mean."""
    return torch.full((len(inner),), 1 / len(inner), dtype=inner.dtype)


def inverse_squares(inner: Tensor, smoothing: float) -> Tensor:
    """Weigh by 1 / |D_k - z|^2."""
    shares = squared_instead(inner, smoothing)
    for _ in range(200):
        squares = inner.diagonal() - 2 * inner @ shares + shares @ inner @ shares
        shares = (1 / squares.clamp(min=smoothing)) / (1 / squares.clamp(min=smoothing)).sum()
    return shares


@pytest.mark.parametrize("broken", [squared_instead, inverse_squares])
def test_the_condition_of_a_minimum_catches(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "weiszfeld", broken)
    rows = [reference.shifted(received(), str(i), 0.3)["n.weight"].double().flatten() for i in range(6)]
    result = combined(geometric_median(), [{"w": row.float()} for row in rows], {"w": torch.zeros(12)})["w"]
    assert pulls(rows, result.double()) > 1e-2
