"""mask: where it may stand, and that nothing stands beside the vector."""

import pytest
import torch

from weft.core.errors import JobError, RunError
from weft.core.types import At, Parcel, State, Wire
from weft.transforms.mask import mask

VECTOR: State = {"ring": {"vector": torch.tensor([5, 1, 0], dtype=torch.int32)}}


def test_only_the_masked_vector_leaves() -> None:
    at = At(7, 1, "a", hide=lambda vector: vector + 100)
    parcel = Parcel(VECTOR, examples=37, weight=37, kept={"x": {}}, metrics={"loss": 1.5, "steps": 19.0})
    sent = mask().client(at, parcel)
    assert sent.update["ring"]["vector"].tolist() == [105, 101, 100]
    assert (sent.weight, sent.examples, sent.metrics) == (1, 0, {})
    assert sent.kept == parcel.kept


def test_nothing_leaves_without_keys() -> None:
    with pytest.raises(RunError, match="agreed on no keys in this round, and nothing leaves it unmasked"):
        mask().client(At(7, 1, "a"), Parcel(VECTOR, 1))


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (Wire(), "put ring right before it"),
        (Wire(ring=True, encoded="zstd"), "put ring right before it"),
        (Wire(ring=True, encoded="mask", hidden=True), "a second mask hides nothing more"),
    ],
)
def test_a_wrong_place_is_refused(wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        mask().check(wire)
