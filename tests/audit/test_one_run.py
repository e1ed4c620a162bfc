"""The bound by hand, and the white-box audit of the private step: it agrees with the claim and catches bugs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.site.private_clients import cohort, draws, flat, recipe, start
from weft.audit.one_run import Audit, audit, bound, chance
from weft.core import trees
from weft.privacy import Spent, epsilon
from weft.site import dpsgd
from weft.site.cohort import Cohort
from weft.site.dpsgd import Draws, Slot
from weft.site.recipe import Recipe

CANARIES, STEPS, NOISE, DELTA = 1000, 10, 4.0, 1e-5
Plant = Callable[[pytest.MonkeyPatch], None]


def test_the_bound_by_hand() -> None:
    """100 of 100 right: q^100 = 0.05 at q = 0.97049, epsilon = log(q / (1 - q)) = 3.4925; without delta."""
    assert bound(100, 100, 100, 0.0, 0.95) == pytest.approx(3.4925, abs=1e-3)
    assert bound(100, 100, 50, 0.0, 0.95) == 0.0


def test_the_chance_by_hand() -> None:
    """Two guesses, both right, epsilon 0: 1/4. With m = 10 and delta 0.001: alpha = max(P[1]/1, P[0 or 1]/2) = 1/2.

    So 0.25 + 2 * 10 * 0.001 * 0.5 = 0.26.
    """
    assert chance(0.0, 10, 2, 2, 0.0) == pytest.approx(0.25)
    assert chance(0.0, 10, 2, 2, 0.001) == pytest.approx(0.26)


def test_more_right_guesses_prove_more() -> None:
    found = [bound(1000, 200, right, 1e-5, 0.95) for right in (100, 120, 150, 190, 200)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] > 3


def test_the_area_under_the_curve() -> None:
    """Scores 1 to 4, in: those of 2 and 4. Pairs that are in order: (2,1), (4,1), (4,3) of 4: 0.75."""
    coins = torch.tensor([False, True, False, True])
    assert audit(torch.tensor([1.0, 2.0, 3.0, 4.0]), coins, 1e-5).auc == 0.75


def attack(engine: Cohort, plant: Plant | None = None) -> Audit:
    """Run the private step on canaries and guess from what it released.

    Each canary is a record whose gradient is 50 times the clip, in a place of its own; every step takes all that
    the coins put in. A canary's score is the sum of the releases at its place: that of an attacker who sees
    every gradient.
    """
    numbers, clip = flat(start(engine)).shape[1], 0.5
    draw = torch.Generator().manual_seed(11)
    ways = torch.eye(numbers)[torch.randperm(numbers, generator=draw)[:CANARIES]]
    coins = torch.rand(CANARIES, generator=draw) < 0.5
    data = [{"ids": torch.zeros(1), "way": i} for i in coins.nonzero()[:, 0].tolist()]

    def gradients(self: Cohort, params: Tensor, slots: Sequence[Slot], layout: Any) -> tuple[Tensor, Tensor]:
        return 50 * clip * ways[[slot.example["way"] for slot in slots]], torch.zeros(len(slots))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cohort, "_apart", gradients)
        if plant:
            plant(patch)
        engine.recipe = recipe(clip, NOISE, batch=CANARIES, steps=STEPS)
        ended = engine.train(1, {"a": data}, start(engine), {}, None, {"a": draws()})
    released = flat(trees.subtract(start(engine), ended.params))[0]
    return audit((ways.double() @ released), coins, DELTA, 0.99)


def test_the_private_step_keeps_its_promise() -> None:
    """Ten steps of noise 4 without sampling: epsilon 3.3 is claimed; the attack finds something, and not more."""
    claimed = epsilon((Spent(NOISE, 1.0, STEPS),), DELTA).value
    assert claimed == pytest.approx(3.34, abs=0.02)
    found = attack(cohort("full"))
    assert 0 < found.epsilon <= claimed
    assert found.auc > 0.6  # the attack sees something: an audit that sees nothing would prove nothing


def less_noise(patch: pytest.MonkeyPatch) -> None:
    """Divide the noise by the root of a batch of 16."""
    right = Draws.noise
    patch.setattr(Draws, "noise", lambda self, count, step: right(self, count, step) / math.sqrt(16))


def no_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dpsgd, "clipped", lambda sums, clip: sums)


def one_noise(patch: pytest.MonkeyPatch) -> None:
    """Add half of the noise and take it away again: noise of one address with both signs."""
    right = Draws.noise
    patch.setattr(Draws, "noise", lambda self, count, step: right(self, count, 0) * (-1) ** step)


@pytest.mark.parametrize("plant", [less_noise, no_clip, one_noise])
def test_a_broken_step_is_disproved(plant: Plant) -> None:
    claimed = epsilon((Spent(NOISE, 1.0, STEPS),), DELTA).value
    assert attack(cohort("full"), plant).epsilon > claimed


def test_batches_too_large_are_taken_whole() -> None:
    """What the audit rests on: with a batch as large as the data, each step takes every record."""
    assert recipe(batch=CANARIES).expected(500) == 500
    assert isinstance(recipe(), Recipe)
