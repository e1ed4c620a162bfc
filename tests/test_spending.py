"""What a run says that it spent: the ledger, the budget, what is refused and what stands in the results."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.conftest import Stop, small_job
from weft import Job
from weft.core.errors import JobError, KeyProblem, RunError
from weft.core.types import Algorithm
from weft.prepare import prepare, set_up
from weft.privacy import Spent, epsilon
from weft.spending import Ledger, told
from weft.watch import Watch

DP = {"clip": 0.1, "noise": 1.0}


@pytest.fixture
def private(values: dict[str, Any]) -> dict[str, Any]:
    """Return the small job with DP-SGD: five, five and four records by two, three rounds."""
    values["local"] |= {"dp": dict(DP)}
    return values


class Heard(Watch):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "privacy.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[weft.Run, list[str]]:
    """Return a finished private run, and the notices that it gave."""
    folder, heard = tmp_path_factory.mktemp("finished"), Heard()
    values = small_job(folder)
    values["local"] |= {"dp": dict(DP)}
    return weft.run(Job(**values), folder / "run", watch=heard), heard.said


def test_a_run_says_what_it_spent(finished: tuple[weft.Run, list[str]]) -> None:
    """The largest client: 5 records, q = 2/5, 3 steps a round, 3 rounds: epsilon of 9 steps at 0.4; the smallest: 6."""
    run, said = finished
    (told_,) = run.results["privacy"]
    nine, six = (epsilon((Spent(1.0, rate, steps),), 1e-5).value for rate, steps in ((0.4, 9), (0.5, 6)))
    assert told_["epsilon"] == pytest.approx(max(nine, six), rel=1e-5)
    assert told_["clients"] == pytest.approx({"site-0": nine, "site-1": nine, "site-2": six}, rel=1e-5)
    assert (told_["unit"], told_["delta"], told_["accountant"], told_["clip"]) == ("one record", 1e-5, "PLD", 0.1)
    assert told_["mechanisms"] == [{"noise": 1.0, "rate": 0.4, "steps": 9}] or told_["worst"] == "site-2"
    assert "Poisson" in told_["sampling"]
    assert any("treated as public" in condition for condition in told_["conditions"])
    assert told_["conditions"][0] == "clients are weighed by their numbers of records"
    assert [row["epsilon"] for row in run.history[1:]] == [line["epsilon"] for line in lines(run.folder)]
    assert any("3 rounds will spend epsilon" in text and "one record" in text for text in said)
    page = (run.folder / "report.html").read_text()
    assert "one record" in page
    assert f"{told_['epsilon']:.3g}"[:3] in page


def test_steps_that_ran_are_steps_that_count(private: dict[str, Any], tmp_path: Path) -> None:
    """Every step draws noise once: as many draws as the ledger has steps."""
    from weft.site.dpsgd import Draws

    seen: list[tuple[Any, ...]] = []
    right = Draws.noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Draws, "noise", lambda self, n, step: seen.append((*self.address[:2], step)) or right(self, n, step)
        )
        weft.run(Job(**private), tmp_path / "run")
    counted = sum(spent[2] for line in lines(tmp_path / "run") for spent in line["record"].values())
    assert len(seen) == len(set(seen)) == counted == 3 * (3 + 3 + 2)


def test_no_loss_of_a_training_record_leaves(finished: tuple[weft.Run, list[str]]) -> None:
    rows = [json.loads(line) for line in (finished[0].folder / "journal.jsonl").read_text().splitlines()]
    told_ = {key for row in rows[1:] for client in row["clients"].values() for key in client}
    assert told_ == {"weight", "examples", "bytes_up", "bytes_down", "update_norm", "seconds", "steps"}


def test_resume_gives_the_same_bytes_and_spends_nothing_twice(
    private: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped after a round, and one whose last round was lost, against one that went through.

    Both have one secret, planted in place of the system's random bytes. Another run of the same job has a secret of
    its own and ends elsewhere.
    """
    job = Job(**private)
    other = weft.run(job, tmp_path / "other").adapter()
    monkeypatch.setattr("weft.site.secret.os.urandom", bytes)
    whole = weft.run(job, tmp_path / "whole").adapter()
    with pytest.raises(KeyboardInterrupt):
        weft.run(job, tmp_path / "stopped", watch=Stop(2))
    last = sorted((tmp_path / "stopped" / "checkpoints").iterdir())[-1]
    last.unlink()  # as if the process had died after the noise of round 2 and before its checkpoint
    assert [line["round"] for line in lines(tmp_path / "stopped")] == [1, 2]
    again = weft.run(job, tmp_path / "stopped", resume=True)
    assert [line["round"] for line in lines(tmp_path / "stopped")] == [1, 2, 3]
    assert all(torch.equal(whole[name], again.adapter()[name]) for name in whole)
    assert again.results["privacy"] == weft.Run(tmp_path / "whole").results["privacy"]
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_another_secret_is_another_release(private: dict[str, Any], tmp_path: Path) -> None:
    """Lose the secret and a round's checkpoint: the round is noised anew, so it counts twice."""
    job = Job(**private)
    with pytest.raises(KeyboardInterrupt):
        weft.run(job, tmp_path / "run", watch=Stop(2))
    sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].unlink()
    (tmp_path / "run" / "clients" / "secret").unlink()
    run = weft.run(job, tmp_path / "run", resume=True)
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2, 2, 3]
    assert run.results["privacy"][0]["mechanisms"][0]["steps"] in (12, 8)


def test_a_resume_cannot_reset_the_ledger(private: dict[str, Any], tmp_path: Path) -> None:
    job, path = Job(**private), tmp_path / "run" / "privacy.jsonl"
    with pytest.raises(KeyboardInterrupt):
        weft.run(job, tmp_path / "run", watch=Stop(2))
    shutil.copy(path, tmp_path / "kept")
    for text, sentence in (
        ("", "lacks round 1, which was run"),
        (path.read_text().splitlines()[1] + "\n", "lacks round 1"),
        ("{not json\n" + path.read_text(), "line 1: the privacy ledger is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=sentence):
            weft.run(job, tmp_path / "run", resume=True)
    path.unlink()
    with pytest.raises(RunError, match="lacks round 1"):
        weft.run(job, tmp_path / "run", resume=True)
    path.write_text((tmp_path / "kept").read_text() + '{"round": 3, "torn')
    assert len(weft.run(job, tmp_path / "run", resume=True).history) == 4
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_the_line_stands_before_the_noise(
    private: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at the first draw of round 2: the ledger holds round 2 already."""
    from weft.site.dpsgd import Draws

    right = Draws.sampled

    def dying(self: Draws, units: int, rate: float, step: int) -> list[int]:
        if self.address[0] == 2:
            raise KeyboardInterrupt
        return right(self, units, rate, step)

    monkeypatch.setattr(Draws, "sampled", dying)
    with pytest.raises(KeyboardInterrupt):
        weft.run(Job(**private), tmp_path / "run")
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2]


def test_a_budget_refuses_a_job(private: dict[str, Any]) -> None:
    private["privacy"] = {"epsilon": 3.0}
    with pytest.raises(KeyProblem, match=r"privacy.epsilon: 3 rounds spend epsilon \d.*, and the budget is 3; raise"):
        prepare(Job(**private))
    private["local"]["dp"]["noise"] = 4.0
    prepare(Job(**private))


def test_a_budget_stops_a_run_cleanly(private: dict[str, Any], tmp_path: Path) -> None:
    """The budget is that of three rounds; one is spent twice, since its secret was lost, so two are left."""
    plain = prepare(Job(**private))
    forecast = plain.account().forecast(plain.federation(), 3)[0]["epsilon"]
    private["privacy"] = {"epsilon": forecast * 1.001}
    job, heard = Job(**private), Heard()
    with pytest.raises(KeyboardInterrupt):
        weft.run(job, tmp_path / "run", watch=Stop(1))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "clients" / "secret").unlink()
    run = weft.run(job, tmp_path / "run", resume=True, watch=heard)
    assert any(text.startswith("privacy.epsilon: with round 3 epsilon would be") for text in heard.said)
    assert run.results["privacy"][0]["epsilon"] <= forecast * 1.001
    assert run.results["stopped"].endswith("the adapter is that of round 2")
    assert run.results["rounds"] == 2
    assert run.adapter()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"local": {"dp": DP, "clip": 1.0}}, "local.clip: dp has a clip of its own"),
        ({"local": {"dp": {"clip": 0.1}}}, "local.dp.noise: is missing"),
        ({"local": {"dp": {**DP, "noise": 0.0}}}, "local.dp.noise: must be more than 0"),
        ({"local": {"dp": {**DP, "nois": 1.0}}}, r"local.dp.nois: unknown key; did you mean `?noise"),
        ({"local": {"dp": {**DP, "unit": "patient"}}}, "local.dp.unit: record 1 has no text or number in the column"),
        ({"local": {"dp": DP}, "algorithm": "ditto"}, "ditto trains twice on the same records in a round"),
        ({"local": {"dp": DP}, "privacy": {"delta": 0.2}}, "privacy.delta: 0.2 is not below one over the 5 units"),
        ({"privacy": {"epsilon": 3.0}}, "privacy.epsilon: nothing in this job adds noise"),
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon: must be more than 0"),
    ],
)
def test_what_means_nothing_is_refused(values: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(JobError, match=sentence):
        prepare(Job(**values))


def test_a_resolved_private_job_loads_again(private: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    first = Job(**private)
    assert first.local.clip is None
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first.resolved()))
    assert weft.load(tmp_path / "again.yaml").hash() == first.hash()


def test_units_of_a_column(private: dict[str, Any], tmp_path: Path) -> None:
    """14 records of 4 patients, each with records at several of the 3 clients: all of a patient's releases count."""
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["patient"] = i // 4
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    private["local"]["dp"]["unit"] = "patient"
    bench = set_up(prepare(Job(**private)))
    found = [[row["unit"] for row in bench.train[name].examples] for name in sorted(bench.train)]
    assert sorted(unit for client in found for unit in client) == [i // 4 for i in range(14)]
    account = bench.account()
    assert account.levels[0].shared == 3
    (row,) = account.forecast(bench.prepared.federation(), 1)
    assert row["unit"] == "all records of a client with one patient"
    assert row["conditions"][0] == "one patient has records at up to 3 clients, and epsilon counts all of them"
    assert row["mechanisms"][0]["steps"] in (9, 6)  # 3 clients x 3 steps, or x 2


def test_a_subset_of_clients_spends_only_where_it_is_asked(private: dict[str, Any], tmp_path: Path) -> None:
    """Two of three clients in each of three rounds: six turns, as the ledger and the forecast both count them."""
    private["clients"] = {"per_round": 2}
    run = weft.run(Job(**private), tmp_path / "run")
    prepared = prepare(Job(**private))
    (row,) = prepared.account().forecast(prepared.federation(), 3)
    assert row == run.results["privacy"][0]
    assert sum(len(line["record"]) for line in lines(tmp_path / "run")) == 6


def test_an_algorithm_that_trains_twice_is_stopped(private: dict[str, Any], tmp_path: Path) -> None:
    """One that does not say so, such as a user's own."""
    from dataclasses import replace

    from weft.algorithms.fedavg import fedavg

    def client(work: Any, received: Any, kept: Any) -> Any:
        return {"adapter": work.train(work.train(received["adapter"]))}, kept

    twice: Algorithm = replace(fedavg(), client=client)
    bench = set_up(prepare(Job(**private)))
    plan = replace(bench.prepared.plan, algorithm=twice)
    site = replace(bench.site(tmp_path, "federated", 1, print), plan=plan)
    from weft.core.types import Order

    order = Order("train", 1, ("site-0",), {"adapter": site.initial}, {}, cohort=("site-0",))
    (reply,) = site.handle(order)
    assert reply.failure is not None
    assert reply.failure.startswith("an algorithm trains twice in a round, and local.dp accounts for once")


def test_norms_over_a_batch_are_refused() -> None:
    from torch import nn

    from weft.site.dpsgd import check_model

    check_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    with pytest.raises(KeyProblem, match=r"local.dp: the base normalises over the batch \(1\)"):
        check_model(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_a_loss_over_pairs_is_refused(private: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from weft import prepare as file

    right = file.plugins.build
    monkeypatch.setattr(
        file.plugins,
        "build",
        lambda choice, kind: replace(right(choice, kind), per_example=False) if kind == "task" else right(choice, kind),
    )
    with pytest.raises(KeyProblem, match=r"local.dp: the loss of causal_lm compares the records of a batch"):
        prepare(Job(**private))


def test_the_secret_stays_where_it_is(finished: tuple[weft.Run, list[str]]) -> None:
    """Its bytes stand in one file, which its owner alone may read; the ledger has its name."""
    folder = finished[0].folder
    secret = folder / "clients" / "secret"
    assert os.stat(secret).st_mode & 0o777 == 0o600
    key = secret.read_bytes()
    others = [path for path in folder.rglob("*") if path.is_file() and path != secret]
    assert not any(key in path.read_bytes() or key.hex().encode() in path.read_bytes() for path in others)
    assert len({line["secret"] for line in lines(folder)}) == 1


def test_no_noise_no_ledger(values: dict[str, Any], tmp_path: Path) -> None:
    run = weft.run(Job(**values), tmp_path / "run")
    assert not (tmp_path / "run" / "privacy.jsonl").exists()
    assert not (tmp_path / "run" / "clients" / "secret").exists()
    assert "privacy" not in run.results
    prepared = prepare(Job(**values))
    assert told(prepared.account(), prepared.federation(), 3) == []
    assert Ledger(tmp_path / "none", prepared.account()).epsilon is None


def test_noise_on_whole_clients(values: dict[str, Any], tmp_path: Path) -> None:
    """All three clients in three rounds, noise 4: three Gaussian mechanisms without sampling; another resume counts."""
    values["pipeline"] = [
        "delta",
        {"clip": {"norm": 0.1}},
        {"weigh": {"by": "uniform"}},
        {"noise": {"multiplier": 4.0}},
    ]
    run = weft.run(Job(**values), tmp_path / "run")
    (row,) = run.results["privacy"]
    assert (row["level"], row["unit"], row["clip"]) == ("site", "one client, all of its records", 0.1)
    assert row["epsilon"] == pytest.approx(epsilon((Spent(4.0, 1.0, 3),), 1e-5).value, rel=1e-5)
    assert "against whoever sees the sums and not against the server" in row["conditions"][0]
    values["local"] |= {"dp": dict(DP)}
    prepared = prepare(Job(**values))
    both = prepared.account().forecast(prepared.federation(), 3)
    assert [one["level"] for one in both] == ["record", "site"]


def test_noise_over_weights_by_size_has_no_epsilon(values: dict[str, Any]) -> None:
    noise = [{"weigh": {"by": "examples", "cap": 5}}, {"noise": {"multiplier": 4.0}}]
    values["pipeline"] = ["delta", {"clip": {"norm": 0.1}}, *noise]
    prepared = prepare(Job(**values))
    (said,) = told(prepared.account(), prepared.federation(), 3)
    assert said == (
        "the noise in the pipeline gives no epsilon: clients are weighed by their sizes, which only they may know, and "
        "the mean divides by them"
    )
