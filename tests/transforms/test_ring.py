"""ring: where it may stand, and what a client sends."""

import pytest
import torch

from weft.core import pipeline
from weft.core.errors import JobError
from weft.core.pipeline import Pipeline
from weft.core.types import At, Parcel, Transform, Wire
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.mask import mask
from weft.transforms.ring import ring
from weft.transforms.weigh import weigh


def steps(*more: Transform, cap: int = 4) -> Pipeline:
    return [(str(i), step) for i, step in enumerate((delta(), clip(1.0), weigh(cap=cap), *more))]


def test_a_vector_by_hand() -> None:
    """Two clients, C = 1, cap 4: the unit is 2^29 (2 (2^29 + 1) < 2^31, 2^30 is one too many). An update of 0.75 - 0.5,
    weight 2 of 4: 2^29 * 0.25 * 0.5 = 2^26. The loss 3 travels as 4, at 2^23 a unit (30 - log2(2 * 64)), halved: 2^24.
    """
    received = {"adapter": {"w": torch.tensor([0.5])}}
    at = At(7, 1, "a", received, ("a", "b"))
    parcel = pipeline.down(
        steps(ring()), at, Parcel({"adapter": {"w": torch.tensor([0.75])}}, 2, metrics={"loss": 3.0})
    )
    assert parcel.update["ring"]["vector"].tolist() == [2**26, 2, 2**24]
    assert parcel.update["ring"]["vector"].dtype == torch.int32


def test_check() -> None:
    wire = pipeline.check(steps(ring()))
    assert (wire.ring, wire.hidden, wire.encoded, wire.heaviest) == (True, False, "ring", 4)
    assert pipeline.check(steps(ring(), mask())).hidden


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (Wire(weighted=True, heaviest=1, norm=1.0), "put delta and clip before it"),
        (Wire(weighted=True, heaviest=1, delta=True), "put delta and clip before it"),
        (Wire(delta=True, norm=1.0), "put weigh before it"),
        (
            Wire(weighted=True, heaviest=1, delta=True, norm=1.0, encoded="topk"),
            "topk leaves codes of each client's own",
        ),
        (Wire(weighted=True, heaviest=1, delta=True, norm=1.0, encoded="ring"), "ring leaves codes"),
        (Wire(weighted=True, delta=True, norm=1.0, heaviest=2**20), r"weigh.cap is 1048576, .* set weigh: \{cap: N\}"),
    ],
)
def test_a_wrong_place_is_refused(wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        ring().check(wire)


def test_an_empty_update_is_a_vector_of_its_fields() -> None:
    at = At(7, 1, "a", {}, ("a", "b", "c"))
    assert pipeline.down(steps(ring()), at, Parcel({}, 3)).update["ring"]["vector"].tolist() == [3, 0]
