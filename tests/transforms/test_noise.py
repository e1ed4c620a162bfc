"""noise: its deviation, its secret, its independence; and a planted fault for each that is found."""

import math
from dataclasses import replace

import pytest
import torch

from weft.core import pipeline, trees
from weft.core.errors import JobError, RunError
from weft.core.sums import Sum
from weft.core.types import State, Tally, Wire
from weft.testing.sound import bits
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.noise import noise, noisy, normal
from weft.transforms.weigh import weigh

STEPS = [("delta", delta()), ("clip", clip(0.5)), ("weigh", weigh("uniform")), ("noise", noise(2.0))]
CAPPED = [("delta", delta()), ("clip", clip(0.5)), ("weigh", weigh(cap=10)), ("noise", noise(2.0))]


def total(*sizes: int, value: float = 0.0) -> Sum:
    result = Sum()
    result.add({"adapter": {f"w{i}": torch.full((size,), value) for i, size in enumerate(sizes)}}, 1)
    return result


def numbers(result: Sum) -> torch.Tensor:
    return trees.joined(result.divided(1))


def mean(steps: pipeline.Pipeline, weights: dict[str, int]) -> torch.Tensor:
    """Return the noise that a mean of updates without any change gets."""
    added = Sum()
    for weight in weights.values():
        added.add({"adapter": {"w": torch.zeros(20_000)}}, weight)
    tally = Tally(1, weights, weights, len(weights), {}, 7, b"secret", pipeline.check(steps))
    return pipeline.up(steps, added, tally)["adapter"]["w"]


@pytest.mark.parametrize(
    ("steps", "weights", "expected"),
    [
        (STEPS, {"a": 1}, 2 * 0.5),
        (STEPS, dict.fromkeys("abcd", 1), 2 * 0.5 / 4),
        (CAPPED, {"a": 10, "b": 4, "c": 2}, 2 * 0.5 * 10 / 16),
    ],
)
def test_the_deviation(steps: pipeline.Pipeline, weights: dict[str, int], expected: float) -> None:
    """Multiplier * norm * cap / sum of weights; 20,000 draws show it to 1 / sqrt(40,000) = 0.5 percent, 5 times that.

    Noise divided by the root of the clients, or without the cap, would be off by 2 or 10.
    """
    drawn = mean(steps, weights)
    assert float(drawn.std()) == pytest.approx(expected, rel=0.025)
    assert abs(float(drawn.mean())) < 5 * expected / math.sqrt(20_000)


def test_the_numbers_are_normal() -> None:
    """Kolmogorov-Smirnov on 100,000: the distance stays below 1.95 / sqrt(n), the critical value at 0.001."""
    drawn = normal(100_000, b"key").sort().values
    expected = torch.distributions.Normal(0.0, 1.0).cdf(drawn)
    places = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    assert float((expected - places).abs().max()) < 1.95 / math.sqrt(len(drawn))
    uniform = (drawn - drawn[0]) / (drawn[-1] - drawn[0])  # negative control: the same numbers, bent
    assert float((uniform - places).abs().max()) > 0.1


def related(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the correlation times the root of n: a normal number where they have nothing to do with each other."""
    return float((left * right).mean() / (left.std() * right.std())) * math.sqrt(len(left))


def test_rounds_secrets_tensors_and_sums_have_noise_of_their_own() -> None:
    here = numbers(noisy(total(5000), 1.0, b"secret", 1))
    others = [
        numbers(noisy(total(5000), 1.0, b"secret", 2)),
        numbers(noisy(total(5000), 1.0, b"other", 1)),
        numbers(noisy(total(5000, value=1.0), 1.0, b"secret", 1)) - 1.0,
        numbers(noisy(total(3, 5000), 1.0, b"secret", 1))[3:],
    ]
    for other in others:
        assert abs(related(here, other)) < 5
    assert related(here, here) > 50  # negative control: the same noise twice would show


def test_a_repeated_round_gives_the_same_bytes_and_leaves_the_sum_as_it_was() -> None:
    given = total(40)
    before = bits(given)
    one, two = (noisy(given, 1.0, b"secret", 1) for _ in range(2))
    assert bits(one) == bits(two)
    assert bits(given) == before
    assert one.weight == given.weight


def test_without_a_secret_nothing_is_released() -> None:
    tally = Tally(1, {"a": 1}, {"a": 1}, 1, {}, 7, b"", pipeline.check(STEPS))
    with pytest.raises(RunError, match="no secret"):
        pipeline.up(STEPS, total(3), tally)
    with pytest.raises(RunError, match="no bound"):
        pipeline.up(STEPS, total(3), replace(tally, secret=b"x", wire=Wire()))


def test_one_client_more_or_less_changes_the_sum_by_no_more_than_the_norm() -> None:
    """The sensitivity that the noise is scaled by, for a huge client, a zero one, and one in a single tensor.

    What arrives is clipped again, so a client that ignores clip changes no more; without that half it would.
    """
    others: State = {"adapter": {"v": torch.ones(3), "w": torch.ones(2, 2)}}
    for own in (
        {"adapter": {"v": torch.full((3,), 1e4), "w": torch.full((2, 2), -1e4)}},
        {"adapter": {"v": torch.zeros(3), "w": torch.zeros(2, 2)}},
        {"adapter": {"v": torch.tensor([0.0, 9.0, 0.0]), "w": torch.zeros(2, 2)}},
    ):
        sums = []
        for clients in ([others], [others, own]):
            added = Sum()
            for update in clients:
                added.add(clip(0.5).arrive(None, update), 1)  # type: ignore[arg-type]
            sums.append(trees.joined(added.divided(1)).double())
        assert float((sums[1] - sums[0]).norm()) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (Wire(weighted=True, uniform=True, heaviest=1), "put clip before it"),
        (Wire(norm=1.0), "put weigh before it"),
        (Wire(norm=1.0, weighted=True, heaviest=2**20), "set weigh.by to uniform, or weigh.cap"),
        (Wire(norm=1.0, weighted=True, uniform=True, heaviest=1, noise=1.0), "a second noise"),
        (Wire(norm=5000.0, weighted=True, uniform=True, heaviest=1), "more than a sum can hold"),
    ],
)
def test_refused(wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        noise(1.0).check(wire)


def test_what_is_known_after_it() -> None:
    assert pipeline.check(STEPS).noise == 2.0
    assert pipeline.check(CAPPED).heaviest == 10
