"""clip: one length over everything, an untouched update where it is short enough."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import At, Parcel, State, Wire
from weft.testing import toys
from weft.transforms.clip import clip

AT = At(7, 1, "a")


def clipped(update: State, norm: float) -> State:
    return clip(norm).client(AT, Parcel(update, 1)).update


def test_by_hand() -> None:
    """|(3, 4, 12)| = 13 over two parts: at norm 6.5 every number is halved."""
    update = {"adapter": {"w": torch.tensor([3.0, 4.0])}, "change": {"w": torch.tensor([12.0])}}
    result = trees.flatten(clipped(update, 6.5))
    assert result["adapter/w"].tolist() == pytest.approx([1.5, 2.0], rel=1e-6)
    assert result["change/w"].item() == pytest.approx(6.0, rel=1e-6)


def test_each_tensor_for_itself_would_be_too_long() -> None:
    """Negative control: three tensors of length 1 each, as a limit of each would leave them, are sqrt(3) together."""
    update = {"adapter": {name: torch.tensor([5.0]) for name in "abc"}}
    alone = {
        "adapter": {name: clipped({"x": {name: tree}}, 1.0)["x"][name] for name, tree in update["adapter"].items()}
    }
    assert trees.norm(trees.flatten(alone)) == pytest.approx(3**0.5, rel=1e-6)
    assert trees.norm(trees.flatten(clipped(update, 1.0))) <= 1.0


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-20, 1e18), st.floats(1e-12, 1e6), st.integers(0, 99))
def test_the_length_is_never_above_the_norm(size: float, norm: float, seed: int) -> None:
    """Rounding to float32 included: in float64 the length stays at or below the norm."""
    update = {"adapter": {"w": toys.draw((40,), seed) * size, "v": toys.draw((3, 7), seed) * size}}
    result = trees.flatten(clipped(update, norm))
    assert trees.norm(result) <= norm
    if trees.norm(trees.flatten(update)) > norm > 1e-9:
        assert trees.norm(result) >= norm * (1 - 1e-5)


def test_short_updates_keep_their_bits() -> None:
    update = {"adapter": {"w": torch.tensor([3.0, 4.0])}}
    assert clipped(update, 5.0) is update
    zero = {"adapter": {"w": torch.zeros(2)}}
    assert clipped(zero, 1e-3) is zero


def test_what_is_not_finite_stays_so_and_is_refused_by_the_server() -> None:
    for bad in (float("nan"), float("inf")):
        assert trees.not_finite(clipped({"adapter": {"w": torch.tensor([bad, 1.0])}}, 1.0)) == "adapter/w"


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (Wire(), "put delta before clip"),
        (Wire(delta=True, encoded="quantize"), "quantize leaves codes"),
        (Wire(delta=True, noise=1.0), "put clip before noise"),
    ],
)
def test_refused(wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        clip(1.0).check(wire)


def test_the_smallest_of_two_norms_holds() -> None:
    wire = clip(2.0).check(clip(1.0).check(Wire(delta=True)))
    assert wire.norm == 1.0
