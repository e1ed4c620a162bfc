"""weigh: the mean with integer weights, by hand."""

import pytest
import torch

from weft.core.errors import JobError
from weft.core.sums import Sum
from weft.core.types import At, Parcel, State, Tally, Transform, Wire
from weft.transforms.weigh import weigh

CLIENTS = {"a": (2.0, 1), "b": (6.0, 3)}  # value and examples


def mean(step: Transform) -> list[float]:
    total, weights = Sum(), {}
    for name, (value, examples) in CLIENTS.items():
        parcel = step.client(At(7, 1, name), Parcel({"x": {"w": torch.tensor([value])}}, examples))
        total.add(parcel.update, parcel.weight)
        weights[name] = parcel.weight
    state = step.server(total, Tally(1, weights, {name: row[1] for name, row in CLIENTS.items()}))
    assert not isinstance(state, Sum)
    result: list[float] = state["x"]["w"].tolist()
    return result


def test_by_examples() -> None:
    """(1 * 2 + 3 * 6) / 4 = 5."""
    assert mean(weigh()) == [5.0]


def test_uniform() -> None:
    """(2 + 6) / 2 = 4."""
    assert mean(weigh("uniform")) == [4.0]


def test_capped() -> None:
    """(1 * 2 + 2 * 6) / 3 = 14 / 3; a cap of 1 is uniform, a cap above all is none."""
    assert mean(weigh(cap=2)) == pytest.approx([14 / 3], rel=2**-23)
    assert mean(weigh(cap=1)) == [4.0]
    assert mean(weigh(cap=100)) == [5.0]


def test_the_update_itself_is_not_touched() -> None:
    update: State = {"x": {"w": torch.tensor([2.0])}}
    parcel = weigh().client(At(7, 1, "a"), Parcel(update, 5))
    assert parcel.update is update
    assert (parcel.weight, parcel.examples) == (5, 5)


def test_check() -> None:
    assert weigh().check(Wire()) == Wire(weighted=True, heaviest=2**20)
    assert weigh(cap=5).check(Wire()) == Wire(weighted=True, heaviest=5)
    assert weigh("uniform").check(Wire()) == Wire(weighted=True, uniform=True, heaviest=1)
    with pytest.raises(JobError, match="leave it out of downlink"):
        weigh().check(Wire(down=True))
    with pytest.raises(JobError, match="a second weigh would divide twice"):
        weigh().check(Wire(weighted=True))
