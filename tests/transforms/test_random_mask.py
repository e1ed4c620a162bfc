"""random_mask: the same places for all clients of a round, others in the next, none of them on the wire."""

import torch

from weft.core import pipeline, trees
from weft.core.sums import Sum
from weft.core.types import At, Parcel, State, Tally
from weft.testing import toys
from weft.transforms.random_mask import places, random_mask
from weft.transforms.weigh import weigh

FORM: State = {"adapter": {"a": torch.zeros(30), "b": torch.zeros(7, 10)}}


def own(name: str) -> State:
    return {"adapter": {part: toys.draw(value.shape, part, name) for part, value in FORM["adapter"].items()}}


def test_only_the_values_of_drawn_places_travel() -> None:
    """0.1 of 100 numbers: ten values, 40 bytes, nothing else."""
    sent = random_mask(0.1, feedback=False).client(At(7, 3, "a"), Parcel(own("a"), 1)).update
    assert {name: tuple(value.shape) for name, value in trees.flatten(sent).items()} == {"random_mask/values": (10,)}
    drawn = places(At(7, 3, "anyone"), 100, 0.1)
    assert torch.equal(sent["random_mask"]["values"], trees.joined(own("a"))[drawn])


def test_places_by_round_and_seed_and_not_by_client() -> None:
    here = places(At(7, 3, "a"), 100, 0.1)
    assert torch.equal(here, places(At(7, 3, "b"), 100, 0.1))
    assert not torch.equal(here, places(At(7, 4, "a"), 100, 0.1))
    assert not torch.equal(here, places(At(8, 3, "a"), 100, 0.1))


def test_every_number_has_its_turn() -> None:
    """Over 600 rounds each of 100 numbers is drawn 60 times in the mean, with a deviation of 7.3."""
    counts = torch.zeros(100)
    for number in range(600):
        counts[places(At(7, number, "a"), 100, 0.1)] += 1
    assert counts.min() > 60 - 5 * 7.3
    assert counts.max() < 60 + 5 * 7.3


def test_the_sum_of_codes_decodes_to_the_sum() -> None:
    """Where replies are hidden in a sum, the server half decodes the mean: the same numbers as reply by reply."""
    step = random_mask(0.1, feedback=False)
    steps = [("random_mask", step), ("weigh", weigh())]
    hidden, plain, at = Sum(), Sum(), At(7, 3, "a", form=FORM)
    for name, count in (("a", 1), ("b", 3)):
        sent = step.client(at, Parcel(own(name), count)).update
        hidden.add(sent, count)
        plain.add(step.arrive(at, sent), count)
    tally = Tally(3, {"a": 1, "b": 3}, {"a": 1, "b": 3}, 2, seed=7)
    forms = [FORM, {"random_mask": {"values": torch.zeros(10)}}, {"random_mask": {"values": torch.zeros(10)}}]
    results = [trees.joined(pipeline.up(steps, total, tally, forms)) for total in (hidden, plain)]
    assert torch.equal(*results)
    assert int((results[0] != 0).sum()) == 10
