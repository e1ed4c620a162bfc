"""topk: the largest changes, their places in few bytes, and nothing lost under error feedback."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core import coding, pipeline, trees
from weft.core.errors import JobError, RunError
from weft.core.pipeline import Pipeline
from weft.core.types import At, Parcel, State, Wire
from weft.testing import toys
from weft.transforms.delta import delta
from weft.transforms.lowrank import lowrank
from weft.transforms.quantize import quantize
from weft.transforms.random_mask import random_mask
from weft.transforms.topk import largest, packed, topk, unpacked

AT = At(7, 1, "a")


def update(*numbers: float) -> State:
    return {"adapter": {"w": torch.tensor(numbers)}}


def test_by_hand() -> None:
    """Of (1, -5, 3, 0.5, -2) over two tensors the two largest are -5 and 3, at places 1 and 2: one byte of bits."""
    given = {"adapter": {"a": torch.tensor([1.0, -5.0]), "b": torch.tensor([3.0, 0.5, -2.0])}}
    step = topk(0.4, feedback=False)
    code = step.client(AT, Parcel(given, 1)).update["topk"]
    assert code["values"].tolist() == [-5.0, 3.0]
    assert code["places"].tolist() == [0b00110]
    back = step.arrive(At(7, 1, "a", form=given), {"topk": code})
    assert trees.flatten(back)["adapter/a"].tolist() == [0.0, -5.0]
    assert trees.flatten(back)["adapter/b"].tolist() == [3.0, 0.0, 0.0]


def test_feedback_by_hand() -> None:
    """One of two: (3, 2) sends 3 and keeps 2; then (0, 1) + (0, 2) sends 3 and keeps nothing."""
    step = topk(0.5)
    first = step.client(AT, Parcel(update(3.0, 2.0), 1))
    assert first.update["topk"]["values"].tolist() == [3.0]
    assert first.kept["adapter"]["w"].tolist() == [0.0, 2.0]
    second = step.client(AT, Parcel(update(0.0, 1.0), 1, kept=first.kept))
    assert second.update["topk"]["values"].tolist() == [3.0]
    assert second.kept["adapter"]["w"].tolist() == [0.0, 0.0]


STEPS = [
    topk(0.2),
    random_mask(0.2),
    lowrank(1, feedback=True),
    quantize(4, feedback=True),
    quantize(8, rounding="stochastic", feedback=True),
    quantize(16, feedback=True),
]


@pytest.mark.parametrize("step", STEPS, ids=["topk", "random_mask", "lowrank", "int4", "int8", "bf16"])
def test_what_was_sent_and_what_is_kept_is_all_there_was(step: object) -> None:
    """Over six rounds: sum of what arrived + residual = sum of the updates, to float32 rounding."""
    assert sent_and_kept(step) < 1e-5


def test_a_residual_that_is_not_added_would_show() -> None:
    """Negative control: without feedback the same sums are apart by what was left out."""
    assert sent_and_kept(topk(0.2, feedback=False)) > 0.5


def sent_and_kept(step: object) -> float:
    steps: Pipeline = [("delta", delta()), ("step", step)]  # type: ignore[list-item]
    start = {"adapter": {"v": torch.zeros(9), "w": torch.zeros(8, 6)}}
    kept: State = {}
    arrived, given = trees.joined(start), trees.joined(start)
    for number in range(1, 7):
        own = {"adapter": {name: toys.draw(value.shape, name, number) for name, value in start["adapter"].items()}}
        at = At(7, number, "a", start)
        parcel = coding.encode(steps, at, Parcel(own, 1, kept=kept), own)
        kept, given = parcel.kept, given + trees.joined(own)
        arrived = arrived + trees.joined(coding.decode(steps, at, parcel.update, own))
    return float((arrived + (trees.joined(kept) if kept else 0) - given).abs().max())


def test_what_rests_in_a_round_keeps_its_residual() -> None:
    """An algorithm whose factors take turns: that of A waits while B is sent, and is sent with A's next turn."""
    step, kept = topk(0.5), dict[str, dict[str, torch.Tensor]]()
    for name in ("a", "b", "a"):
        parcel = step.client(AT, Parcel({"trained": {name: torch.tensor([3.0, 2.0])}}, 1, kept=kept))
        kept = parcel.kept
    assert parcel.update["topk"]["values"].tolist() == [4.0]  # 2 + 2 before the fresh 3
    assert {name: value.tolist() for name, value in kept["trained"].items()} == {"a": [3.0, 0.0], "b": [0.0, 2.0]}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(0, 10**6), st.booleans())
def test_the_largest(numbers: int, seed: int, ties: bool) -> None:
    """As a stable sort finds them: of equal ones the first."""
    sizes = torch.randint(0, 4 if ties else 10**6, (numbers,), generator=torch.Generator().manual_seed(seed)).float()
    count = 1 + seed % numbers
    expected = sizes.sort(descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(largest(sizes, count), expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70_000), st.floats(0.00001, 1.0))
def test_places_in_few_bytes(numbers: int, fraction: float) -> None:
    """Never more than one bit a number, nor than the smallest whole number a place; and found again."""
    count = max(1, int(numbers * fraction))
    places = torch.randperm(numbers, generator=torch.Generator().manual_seed(count))[:count].sort().values
    code = packed(places, numbers)
    smallest = 1 if numbers <= 256 else 2 if numbers <= 65536 else 4
    assert code.numel() * code.itemsize == min(-(-numbers // 8), count * smallest)
    assert torch.equal(unpacked(code, numbers, count), places)


@pytest.mark.parametrize(
    ("code", "numbers", "count"),
    [
        (torch.tensor([0b111], dtype=torch.uint8), 4, 2),  # three places for two numbers
        (torch.tensor([0b10001], dtype=torch.uint8), 4, 2),  # beyond the last number
        (torch.tensor([5, 5], dtype=torch.uint8), 200, 2),
        (torch.tensor([6, 5], dtype=torch.uint8), 200, 2),
        (torch.tensor([5, 200], dtype=torch.uint8), 200, 2),
    ],
)
def test_impossible_places_are_refused(code: torch.Tensor, numbers: int, count: int) -> None:
    with pytest.raises(RunError, match="places are not those of different numbers, in order"):
        unpacked(code, numbers, count)


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (Wire(), "put delta before it"),
        (Wire(delta=True, encoded="quantize"), "quantize leaves codes"),
        (Wire(delta=True, noise=1.0), "error feedback sends more than clip allows"),
        (Wire(down=True), "leave it out of downlink"),
    ],
)
@pytest.mark.parametrize("make", [topk, random_mask])
def test_refused(make: type, wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        make().check(wire)


def test_feedback_takes_the_bound_away() -> None:
    known = Wire(delta=True, norm=1.0)
    assert topk().check(known).norm is None
    assert topk(feedback=False).check(known).norm == 1.0


def test_quantized_values_of_topk() -> None:
    """Both steps together: 8 of 80 numbers as int8, one scale, and ten bytes of places less than one bit each."""
    steps: Pipeline = [("delta", delta()), ("topk", topk(0.1)), ("quantize", quantize(8))]
    own = {"adapter": {"w": toys.draw((8, 10), "w")}}
    sent = pipeline.down(steps, AT, Parcel(own, 1)).update
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in trees.flatten(sent).items()}
    assert sizes == {"quantize/codes": 8, "quantize/scales": 2, "topk/places": 8}
    back = coding.decode(steps, AT, sent, own)["adapter"]["w"]
    assert int((back != 0).sum()) == 8
    kept = back != 0
    assert torch.allclose(back[kept], own["adapter"]["w"][kept], atol=float(back.abs().max()) / 250)
