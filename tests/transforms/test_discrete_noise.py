"""discrete_noise: exact chances, the planned deviation, new noise for every client, round and vector."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from weft.core import keys, pipeline
from weft.core.errors import JobError, RunError
from weft.core.pipeline import Pipeline
from weft.core.ring import FIELDS, code
from weft.core.types import At, Parcel, Wire
from weft.transforms import discrete_gaussian
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.discrete_gaussian import Stream, gaussian, laplace
from weft.transforms.discrete_noise import discrete_noise
from weft.transforms.ring import ring
from weft.transforms.weigh import weigh

DRAWS = 200_000


def stream(name: str = "a") -> Stream:
    return Stream(keys.secret(b"test", name))


def p_value(drawn: Any, chance: Any, reach: int) -> float:
    """Return the chi-square p-value of numbers in -reach..reach against their chances; rarer ones are one class."""
    places = np.arange(-reach, reach + 1)
    weights = chance(places.astype(float))
    wide = np.arange(-40 * reach, 40 * reach + 1)
    expected = len(drawn) * weights / chance(wide.astype(float)).sum()
    counts = np.array([(drawn == place).sum() for place in places])
    rest, rest_expected = len(drawn) - counts.sum(), len(drawn) - expected.sum()
    kept = expected > 10
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    statistic += (rest + counts[~kept].sum() - rest_expected - expected[~kept].sum()) ** 2 / (
        rest_expected + expected[~kept].sum()
    )
    return float(chi2.sf(statistic, kept.sum()))


@pytest.mark.parametrize("deviation", [0.4, 1.0, 2.5, 7.3])
def test_gaussian_has_its_exact_chances(deviation: float) -> None:
    drawn = gaussian(stream(), deviation, DRAWS)
    assert p_value(drawn, lambda y: np.exp(-(y**2) / (2 * deviation**2)), round(4 * deviation) + 1) > 1e-4


@pytest.mark.parametrize("scale", [1, 3, 8])
def test_laplace_has_its_exact_chances(scale: int) -> None:
    assert p_value(laplace(stream(), scale, DRAWS), lambda y: np.exp(-np.abs(y) / scale), 4 * scale) > 1e-4


def test_a_rounded_gaussian_has_others() -> None:
    """Negative control: a float Gaussian that is rounded has a variance larger by 1/12; at 0.4 it shows at once."""
    drawn = np.random.default_rng(1).normal(0, 0.4, DRAWS).round()
    assert p_value(drawn, lambda y: np.exp(-(y**2) / (2 * 0.4**2)), 3) < 1e-4


def test_undecided_coins_are_settled_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin of one every coin is settled by integers and long decimals; the chances stay the same."""
    settled = []
    settle = Stream._settle

    def counting(self: Stream, bits: int, x: Fraction) -> bool:
        settled.append(x)
        return settle(self, bits, x)

    monkeypatch.setattr(Stream, "_settle", counting)
    yes = stream().coins(np.full(4000, 0.7), lambda i: Fraction(7, 10), margin=1.0)
    assert len(settled) > 3000
    assert abs(yes.mean() - np.exp(-0.7)) < 5 * (np.exp(-0.7) * (1 - np.exp(-0.7)) / 4000) ** 0.5
    settled.clear()
    gaussian(stream(), 3.0, 10_000)
    assert settled == []


def test_a_coin_is_settled_by_its_bits() -> None:
    """Exp(-7/10) = 0.49658...: a first half below it says yes, one above says no, whatever bits follow."""
    assert stream()._settle(int(0.4965 * 2**53), Fraction(7, 10))
    assert not stream()._settle(int(0.4966 * 2**53), Fraction(7, 10))


def test_below_is_uniform() -> None:
    drawn = stream().below(5, 50_000)
    counts = np.bincount(drawn, minlength=5)
    assert float(chi2.sf(((counts - 10_000) ** 2 / 10_000).sum(), 4)) > 1e-4
    assert (len(counts), stream().below(1, 9).tolist()) == (5, [0] * 9)


def test_large_deviations_are_those_asked_for() -> None:
    """2^25 units: standard deviation and fourth moment (3 sigma^4) to five standard errors."""
    deviation = 2.0**25 / 3
    drawn = gaussian(stream(), deviation, DRAWS) / deviation
    assert abs(drawn.std() - 1) < 5 / (2 * DRAWS) ** 0.5
    assert abs(drawn.mean()) < 5 / DRAWS**0.5
    assert abs((drawn**4).mean() - 3) < 5 * (96 / DRAWS) ** 0.5
    assert len(gaussian(stream(), 2.0, 0)) == 0
    assert len(gaussian(stream(), 2.0, discrete_gaussian.CHUNK + 5)) == discrete_gaussian.CHUNK + 5


# --- in a pipeline


def steps(multiplier: float = 1.0, colluders: int = 1) -> Pipeline:
    made = (delta(), clip(1.0), weigh("uniform"), ring(), discrete_noise(multiplier, colluders))
    return [(str(i), step) for i, step in enumerate(made)]


def sent(client: str = "a", number: int = 1, value: float = 0.0, secret: bytes = b"secret") -> torch.Tensor:
    """Return the coordinates that a client of ten sends."""
    update = torch.zeros(20_000)
    update[0] = value
    at = At(7, number, client, {}, tuple("abcdefghij"), secret=keys.secret(secret, client))
    vector = pipeline.down(steps(), at, Parcel({"a": {"w": update}}, 1, metrics={"loss": 3.0})).update["ring"]["vector"]
    assert vector[-FIELDS:].tolist() == [1, 0]  # the loss is not told: no noise would cover it
    return vector[:-FIELDS].double()


def test_a_share_is_planned_for_those_who_must_stay() -> None:
    """Of ten, t = 7 stay, one may collude, so six shares make the noise: each sigma / sqrt(6)."""
    known = code(pipeline.check(steps()), 10)
    share = known.unit / 6**0.5
    assert abs(float(sent().std()) / share - 1) < 5 / (2 * 20_000) ** 0.5
    assert float(sent().abs().max()) < 6 * share


def test_noise_is_new_for_each_client_round_vector_and_secret_and_else_the_same() -> None:
    first = sent()
    assert torch.equal(first, sent())
    others = [sent("b"), sent(number=2), sent(value=2.0**-20), sent(secret=b"other")]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([first[1:], other[1:]]))[0, 1])) < 5 / 20_000**0.5


def test_noise_without_a_secret_is_refused() -> None:
    at = At(7, 1, "a", {}, ("a", "b", "c"))
    with pytest.raises(RunError, match="no secret to draw its noise from"):
        pipeline.down(steps(), at, Parcel({"a": {"w": torch.zeros(2)}}, 1))


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (Wire(norm=1.0, uniform=True), "put it between ring and mask"),
        (Wire(norm=1.0, uniform=True, ring=True, hidden=True), "put it between ring and mask"),
        (Wire(norm=1.0, uniform=True, ring=True, encoded="ring", noise=1.0), "there is noise already"),
        (Wire(norm=1.0, ring=True, encoded="ring"), r"set weigh: \{by: uniform\}"),
    ],
)
def test_a_wrong_place_is_refused(wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        discrete_noise(1.0, 0).check(wire)


def test_check_says_what_the_noise_is() -> None:
    wire = pipeline.check(steps(2.5, 2))
    assert (wire.noise, wire.colluders, wire.ring) == (2.5, 2, True)
