"""quantize: by hand, half a step off at most, right on average, bytes as promised."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core import pipeline, trees
from weft.core.errors import JobError
from weft.core.types import At, Parcel, State, Transform, Wire
from weft.testing import toys
from weft.transforms.quantize import NF4, quantize

AT = At(7, 1, "a")


def vector(values: Any) -> State:
    return {"adapter": {"w": torch.as_tensor(values, dtype=torch.float32)}}


def code(step: Transform, state: State, at: At = AT) -> dict[str, torch.Tensor]:
    return step.client(at, Parcel(state, 1)).update["quantize"]


def there_and_back(step: Transform, state: State, at: At = AT) -> torch.Tensor:
    sent = step.client(at, Parcel(state, 1)).update
    return trees.joined(step.arrive(At(7, 1, "a", form=state), sent))


def test_int8_by_hand() -> None:
    """The largest, 254, has code 127, so the step is 2: 10 -> 5, -3 -> -1.5 -> -2 (to even), 1 -> 0.5 -> 0."""
    sent = code(quantize(8), vector([254.0, 10.0, -3.0, 1.0]))
    assert sent["codes"].tolist() == [127, 5, -2, 0]
    assert sent["scales"].tolist() == [2.0]
    assert there_and_back(quantize(8), vector([254.0, 10.0, -3.0, 1.0])).tolist() == [254.0, 10.0, -4.0, 0.0]


def test_int4_by_hand() -> None:
    """Step 1: 7, -7, 2 and 1.4 -> 1; two codes a byte, the first in the lower half: 7 | -7 << 4 = 0x97, 2 | 1 << 4."""
    sent = code(quantize(4), vector([7.0, -7.0, 2.0, 1.4]))
    assert sent["codes"].tolist() == [0x97, 0x12]
    assert there_and_back(quantize(4), vector([7.0, -7.0, 2.0, 1.4])).tolist() == [7.0, -7.0, 2.0, 1.0]


def test_nf4_by_hand() -> None:
    """Times 2: 2 is level 15, -2 level 0, 0 level 7, and 0.9 = 2 x 0.45 lies nearest to 0.4407, level 12."""
    sent = code(quantize(4, "normal"), vector([2.0, -2.0, 0.0, 0.9]))
    assert sent["codes"].tolist() == [15 | 0 << 4, 7 | 12 << 4]
    assert there_and_back(quantize(4, "normal"), vector([0.9, 2.0])).tolist() == pytest.approx([2 * NF4[12], 2.0])


def test_the_levels_are_those_of_the_paper() -> None:
    """Equal bitsandbytes' table, functional.py get_4bit_type("nf4"), digit by digit: quantiles of a normal.

    Definition, with offset 0.9677083: eight values of the quantile from offset down to 1/2 above zero, seven below,
    and zero, all over the largest.
    """
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    assert torch.allclose(torch.tensor(NF4, dtype=torch.float64), levels / levels.max(), atol=1e-6)


def test_bfloat16_by_hand() -> None:
    """Eight bits of precision: between 1 and 1.0078125 there is nothing."""
    assert there_and_back(quantize(16), vector([1.001, 1.005, -3.0])).tolist() == [1.0, 1.0078125, -3.0]
    assert code(quantize(16), vector([1.0]))["codes"].dtype == torch.bfloat16


NEAREST = [quantize(8), quantize(4), quantize(4, "normal"), quantize(16), quantize(8, block=8), quantize(4, block=200)]


@pytest.mark.parametrize("step", NEAREST)
def test_its_own_results_are_found_again(step: Transform) -> None:
    once = there_and_back(step, vector(toys.draw((333,), "x") * 1e-3))
    assert torch.equal(there_and_back(step, vector(once)), once)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 300), st.floats(1e-30, 1e4), st.integers(0, 999))
def test_half_a_step_at_most(bits: Any, size: int, scale: float, seed: int) -> None:
    """|error| <= step / 2, with the step of the number's own block; the last block may be short."""
    given = toys.draw((size,), seed) * scale
    step = quantize(bits)
    error = (there_and_back(step, vector(given)) - given).abs()
    steps = code(step, vector(given))["scales"].float().repeat_interleave(64)[:size]
    assert bool((error <= steps / 2 * (1 + 1e-5)).all())


STOCHASTIC = [
    quantize(8, rounding="stochastic"),
    quantize(4, rounding="stochastic"),
    quantize(4, "normal", "stochastic"),
    quantize(16, rounding="stochastic"),
]


@pytest.mark.parametrize("step", STOCHASTIC)
def test_stochastic_rounding_is_right_on_average(step: Transform) -> None:
    """The mean of 1000 roundings lies within 5 standard errors."""
    given = toys.draw((64,), "mean")
    assert farthest(step, given) < 5


def farthest(step: Transform, given: torch.Tensor) -> float:
    """Return the largest distance of the means from the numbers, in standard errors as they were seen."""
    results = torch.stack([there_and_back(step, vector(given), At(7, i, "a")) for i in range(1000)]).double()
    error = (results.mean(0) - given.double()).abs()
    seen = results.std(0).clamp(min=1e-3 * float(given.abs().max()) / 1000**0.5) / 1000**0.5
    return float((error / seen).max())


def test_nearest_rounding_is_not_and_would_show() -> None:
    """Negative control: the same measure finds rounding to the nearest off by far more."""
    assert farthest(quantize(4), toys.draw((64,), "mean")) > 50


def test_draws_by_seed_round_and_client() -> None:
    step, given = quantize(4, rounding="stochastic"), vector(toys.draw((200,), "x"))
    here = code(step, given)["codes"]
    assert torch.equal(here, code(step, given)["codes"])
    for other in (At(8, 1, "a"), At(7, 2, "a"), At(7, 1, "b")):
        assert not torch.equal(here, code(step, given, other)["codes"])


def test_blocks_of_zeros_and_of_the_smallest_numbers() -> None:
    """A block without a scale is zeros; numbers too small for any scale become zero, never a NaN."""
    for step in (*NEAREST, *STOCHASTIC):
        assert there_and_back(step, vector(torch.zeros(70))).tolist() == [0.0] * 70
        assert bool(torch.isfinite(there_and_back(step, vector([1e-45, -1e-40, 0.0]))).all())


@pytest.mark.parametrize(
    ("step", "size"),
    [(quantize(16), 2 * 130), (quantize(8), 130 + 2 * 3), (quantize(4), 65 + 2 * 3), (quantize(4, "normal"), 65 + 6)],
)
def test_bytes(step: Transform, size: int) -> None:
    """130 numbers in blocks of 64: three scales of two bytes each, and 2, 1 or 1/2 bytes a number."""
    sent = step.client(AT, Parcel(vector(toys.draw((130,), "x")), 1)).update
    assert sum(value.numel() * value.itemsize for value in trees.flatten(sent).values()) == size


def test_blocks_do_not_cross_tensors() -> None:
    """A small tensor beside a large one keeps its own scale."""
    given = {"adapter": {"a": torch.tensor([1000.0]), "b": torch.tensor([0.001])}}
    assert there_and_back(quantize(8), given).tolist() == pytest.approx([1000.0, 0.001], rel=0.01)


@pytest.mark.parametrize(
    ("step", "wire", "words"),
    [
        (quantize(8, "normal"), Wire(), "set bits to 4"),
        (quantize(), Wire(encoded="quantize"), "no numbers to round"),
        (quantize(), Wire(encoded="zstd"), "no numbers to round"),
        (quantize(feedback=True), Wire(encoded="topk"), "places of topk change"),
        (quantize(feedback=True), Wire(noise=1.0), "error feedback sends more"),
    ],
)
def test_refused(step: Transform, wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        step.check(wire)


def test_an_empty_update_stays_empty() -> None:
    steps = [("quantize", quantize()), ("x", Transform())]
    assert pipeline.down(steps, AT, Parcel({}, 1)).update == {}
    assert quantize().arrive(AT, {}) == {}
