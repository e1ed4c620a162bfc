"""Trackers get every row once; the real packages, where they are installed, give back what was sent."""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import weft
from weft import Job
from weft.core.errors import JobError
from weft.trackers import tracker
from weft.trackers.tracker import Calls, Tracked, opener, parameters
from weft.watch import Watch

HERE = {name: importlib.util.find_spec(name) is not None for name in tracker.NAMES}


def test_every_round_is_sent_once_and_shown_as_before(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds; the rows are those of the journal, numbers only; a stopped and resumed run sends no row twice."""
    sent: list[tuple[str, int, Mapping[str, float]]] = []
    ended: list[Path] = []
    fake = lambda folder, job: Calls(lambda *row: sent.append(row), lambda: ended.append(folder))  # noqa: E731
    monkeypatch.setattr(tracker, "opener", lambda name: fake)
    shown: list[int] = []

    class Shown(Watch):
        def round(self, method: str, number: int, row: dict[str, Any]) -> None:
            shown.append(number)

    folder = tmp_path / "run"
    run = weft.run(job, folder, watch=Tracked(Shown(), folder, job, ["tensorboard"]), threads=1)
    assert [(method, number) for method, number, _ in sent] == [("federated", 1), ("federated", 2), ("federated", 3)]
    assert shown == [1, 2, 3]
    assert ended == [folder]
    last = run.history[-1]
    assert sent[-1][2]["test_loss"] == last["test_loss"]
    assert sent[-1][2]["bytes_up"] == last["bytes_up"]
    assert all(isinstance(value, float) for _, _, row in sent for value in row.values())
    weft.run(job, folder, resume=True, watch=Tracked(Watch(), folder, job, ["tensorboard"]), threads=1)
    assert len(sent) == 3


def test_a_tracker_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="did you mean `wandb`"):
        opener("wandbb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"mlflow is not installed; pip install 'weft-fl\[mlflow\]'"):
        opener("mlflow")


def test_wandb_is_called_offline(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    given: dict[str, Any] = {}

    def init(**keys: Any) -> Any:
        given.update(keys)
        return SimpleNamespace(log=logged.append, finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    from weft.trackers.wandb import wandb

    opened = wandb(tmp_path, job)
    opened.row("federated", 2, {"loss": 1.5})
    opened.end()
    assert given["mode"] == "offline"
    assert given["config"] == job.resolved()
    assert logged == [{"round": 2, "federated/loss": 1.5}, "end"]


@pytest.mark.skipif(not HERE["tensorboard"], reason="tensorboard is an extra")
def test_tensorboard_gives_back_what_was_sent(job: Job, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = opener("tensorboard")(tmp_path, job)
    opened.row("federated", 1, {"test_loss": 2.5})
    opened.row("federated", 2, {"test_loss": 2.25})
    opened.end()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("federated/test_loss")] == [(1, 2.5), (2, 2.25)]


@pytest.mark.skipif(not HERE["mlflow"], reason="mlflow is an extra")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_gives_back_what_was_sent(job: Job, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    for round_ in (1, 2):  # opened twice, as a resumed run does
        opened = opener("mlflow")(tmp_path, job)
        opened.row("federated", round_, {"test_loss": 3.0 - round_})
        opened.end()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("weft").experiment_id])
    history = client.get_metric_history(run.info.run_id, "federated.test_loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.0), (2, 1.0)]
    assert run.data.params["rounds"] == "3"


@pytest.mark.skipif(not HERE["wandb"], reason="wandb is an extra")
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_a_run_offline(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    opened = opener("wandb")(tmp_path, job)
    opened.row("federated", 1, {"test_loss": 2.5})
    opened.end()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_parameters_are_one_name_a_value(job: Job) -> None:
    found = parameters(job)
    assert found["local.lr"] == "0.01"
    assert found["adapter.lora.rank"] == "2"
    json.dumps(found)
