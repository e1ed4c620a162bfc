"""Noise on whole updates, as a run accounts for it: clip that adapts, shares of discrete noise, and what is refused."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.conftest import Stop, small_job
from weft import Job
from weft.core import keys, pipeline
from weft.core.errors import JobError, KeyProblem
from weft.core.meeting import threshold
from weft.core.ring import FIELDS, code, encode
from weft.core.types import At, Parcel, Wire
from weft.journal import read as read_journal
from weft.prepare import prepare
from weft.privacy import Spent, epsilon
from weft.secure.refusals import FINEST
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.discrete_noise import discrete_noise
from weft.transforms.ring import ring
from weft.transforms.weigh import weigh

ADAPTIVE: list[Any] = [
    "delta",
    {"clip": {"norm": 0.5, "quantile": 0.5, "spread": 1.5}},
    {"weigh": {"by": "uniform"}},
    {"noise": {"multiplier": 2.0}},
]


def hidden(multiplier: float = 2.0, colluders: int = 1) -> list[Any]:
    noise = {"discrete_noise": {"multiplier": multiplier, "colluders": colluders}}
    return ["delta", {"clip": {"norm": 2.0}}, {"weigh": {"by": "uniform"}}, "ring", noise, "mask"]


# --- clip that adapts


def test_a_run_that_is_killed_and_resumed_has_the_same_lengths_and_bytes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after round 2, whose checkpoint is lost as well; one secret for all, in place of the system's bytes.

    What is promised is noise 2 over three rounds, as with a fixed clip: the updates' own noise is 2.683.
    """
    monkeypatch.setattr("weft.site.secret.os.urandom", bytes)
    values = {**values, "pipeline": ADAPTIVE, "baselines": []}
    whole = weft.run(Job(**values), tmp_path / "whole", report=False)
    with pytest.raises(KeyboardInterrupt):
        weft.run(Job(**values), tmp_path / "stopped", watch=Stop(2), report=False)
    sorted((tmp_path / "stopped" / "checkpoints").iterdir())[-1].unlink()
    again = weft.run(Job(**values), tmp_path / "stopped", resume=True, report=False)
    assert all(torch.equal(tensor, again.adapter()[name]) for name, tensor in whole.adapter().items())
    rows, others = (read_journal(run.folder / "journal.jsonl")[1:] for run in (whole, again))
    for key in ("clip_norm", "clip_share"):
        assert [row[key] for row in rows] == [row[key] for row in others]
    assert rows[0]["clip_norm"] == 0.5
    for row, after in pairwise(rows):
        expected = row["clip_norm"] * math.exp(-0.2 * (row["clip_share"] - 0.5))
        assert after["clip_norm"] == pytest.approx(expected, rel=1e-5)
    (told,) = whole.results["privacy"]
    assert told["epsilon"] == pytest.approx(epsilon((Spent(2.0, 1.0, 3),), 1e-5).value, rel=1e-5)
    assert "the updates get noise 2.683, so that both together are noise 2" in " ".join(told["conditions"])
    assert not any("short" in client for row in rows for client in row["clients"].values())


def test_a_server_that_does_not_wait_is_refused(values: dict[str, Any]) -> None:
    pace = {"clients": {"pace": {"fedbuff": {"buffer": 2}}}, "pipeline": [*ADAPTIVE[:3]]}
    with pytest.raises(KeyProblem, match=r"leave clip\.quantile out"):
        prepare(Job(**{**values, **pace}))


# --- shares of discrete noise


def by_rdp(noise: float, steps: int, delta: float) -> float:
    """Return min over a of a rho + log((a-1)/a) - (log delta + log a) / (a-1), rho = steps / (2 noise^2).

    The zCDP of T releases of discrete Gaussian noise and its conversion: Canonne, Kamath, Steinke 2020, theorem 14 and
    proposition 12.
    """
    rho = steps / (2 * noise**2)
    orders = [1 + i / 200 for i in range(1, 40_000)]
    return min(a * rho + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders)


def test_the_forecast_is_that_of_the_fewest_shares(values: dict[str, Any]) -> None:
    """Three rounds at noise 2, rho = 3/8: epsilon 4.011 by RDP at 1e-5; PLD, without proof here, would say 3.709."""
    prepared = prepare(Job(**{**values, "pipeline": hidden()}))
    (told,) = prepared.account().forecast(prepared.federation(), 3)
    assert told["epsilon"] == pytest.approx(by_rdp(2.0, 3, 1e-5), rel=1e-3)
    assert told["epsilon"] == pytest.approx(4.011, abs=1e-3)
    assert epsilon((Spent(2.0, 1.0, 3),), 1e-5).value == pytest.approx(3.709, abs=1e-3)
    assert (told["level"], told["accountant"], told["pld"]) == ("site", "RDP", None)
    assert told["conditions"][0].startswith("the noise is that of 2 clients' shares: of 3 in a round at least 3 stay")
    assert "noise is drawn in floating point" not in told["conditions"]
    with pytest.raises(KeyProblem, match=r"privacy.epsilon: 3 rounds spend epsilon 4.011"):
        prepare(Job(**{**values, "pipeline": hidden(), "privacy": {"epsilon": 4.0}}))
    prepare(Job(**{**values, "pipeline": hidden(), "privacy": {"epsilon": 4.1}}))


def test_a_hidden_run_writes_what_it_spent(tmp_path: Path) -> None:
    values = {**small_job(tmp_path), "pipeline": hidden(), "rounds": 2, "baselines": []}
    run = weft.run(Job(**values), tmp_path / "run", report=False)
    lines = [json.loads(line) for line in (run.folder / "privacy.jsonl").read_text().splitlines()]
    assert [line["site"] for line in lines] == [{f"site-{i}": [2.0, 1.0, 1] for i in range(3)}] * 2
    assert [line["epsilon"] for line in lines] == pytest.approx([by_rdp(2.0, n, 1e-5) for n in (1, 2)], rel=1e-3)
    assert run.results["privacy"][0]["epsilon"] == lines[-1]["epsilon"]


def shares(clients: int, staying: int, colluders: int) -> torch.Tensor:
    """Return what those that stay add up to, without the shares that are known, in lengths of clip: noise alone."""
    steps = [delta(), clip(2.0), weigh("uniform"), ring(), discrete_noise(1.5, colluders)]
    named = [(str(i), step) for i, step in enumerate(steps)]
    cohort, total = tuple(f"c{i}" for i in range(clients)), torch.zeros(20_000, dtype=torch.float64)
    for name in cohort[: staying - colluders]:
        at = At(7, 1, name, {}, cohort, secret=keys.secret(b"secret", name))
        sent = pipeline.down(named, at, Parcel({"a": {"w": torch.zeros(20_000)}}, 1)).update["ring"]["vector"]
        total += sent[:-FIELDS].double()
    known = code(pipeline.check(named), clients)
    return total / (known.unit * known.norm)


@pytest.mark.parametrize(("clients", "colluders"), [(6, 0), (6, 2), (9, 1)])
def test_the_fewest_that_may_stay_make_the_noise_that_is_promised(clients: int, colluders: int) -> None:
    """With t of n and c known the deviation is 1.5, to five standard errors; with all of them root((n-c)/(t-c)) more.

    Negative control: shares planned for all n would leave root((t-c)/n) of it, below every bound here.
    """
    stay, error = threshold(clients), 5 / math.sqrt(2 * 20_000)
    assert float(shares(clients, stay, colluders).std()) == pytest.approx(1.5, rel=error)
    more = math.sqrt((clients - colluders) / (stay - colluders))
    assert float(shares(clients, clients, colluders).std()) == pytest.approx(1.5 * more, rel=error)
    assert math.sqrt((stay - colluders) / clients) < 1 - error


def rounded_up(coordinates: int, noise: float) -> float:
    """Return how long an update of length 1 gets in the ring, where each number is rounded up by nearly a half."""
    known = code(Wire(norm=1.0, heaviest=1, noise=noise), 100)
    units = known.unit * (1 - math.sqrt(coordinates) / 2 / known.unit if noise else 1.0)
    value = (math.floor(units / math.sqrt(coordinates) - 0.51) + 0.51) / units
    vector = encode({"a": {"w": torch.full((coordinates,), value)}}, 1, None, known)[:-FIELDS].double()
    assert value * math.sqrt(coordinates) <= 1
    return float(vector.norm()) / known.unit


def test_rounding_does_not_lengthen_what_the_noise_is_scaled_by() -> None:
    """The integers stay within C 2^f where noise is to come; without the room that is left for it they would not."""
    lengths = [(rounded_up(size, 2.0), rounded_up(size, 0.0)) for size in range(90_000, 90_040)]
    assert max(noised for noised, _ in lengths) <= 1
    assert max(plain for _, plain in lengths) > 1


def test_shares_too_coarse_to_add_up_are_refused(values: dict[str, Any]) -> None:
    """From four units on, tau = 10 (n - 1) exp(-2 pi^2 4^2 / 2) at most: 10 * 99 * 2.6e-69 of 100 clients.

    With noise of 1e-9 lengths, 2^31 / 3 units a length, a share of two has 0.5 units.
    """
    assert 10 * 99 * math.exp(-2 * math.pi**2 * FINEST**2 / 2) < 3e-66
    with pytest.raises(JobError, match="below 4 a sum of shares has no known epsilon; raise the multiplier"):
        prepare(Job(**{**values, "pipeline": hidden(1e-9)}))
