"""FlowerTune's pyproject.toml, written as its example has it."""

import json
import sys
from pathlib import Path

import pytest

import weft
from tests.conftest import EXAMPLES, WORDS
from weft import cli
from weft.core.errors import JobError
from weft.importers.flowertune import import_flowertune
from weft.job import load

SOURCE = """
[project]
name = "flowertune-llm"

[tool.flwr.app]
publisher = "flwrlabs"

[tool.flwr.app.components]
serverapp = "flowertune_llm.server_app:app"
clientapp = "flowertune_llm.client_app:app"

[tool.flwr.app.config]
model.name = "openlm-research/open_llama_3b_v2"
model.quantization = 4
model.gradient-checkpointing = true
model.lora.peft-lora-r = 32
model.lora.peft-lora-alpha = 64
train.save-every-round = 5
train.learning-rate-max = 5e-5
train.learning-rate-min = 1e-6
train.seq-length = 512
train.training-arguments.output-dir = ""
train.training-arguments.learning-rate = ""
train.training-arguments.per-device-train-batch-size = 16
train.training-arguments.gradient-accumulation-steps = 1
train.training-arguments.logging-steps = 10
train.training-arguments.num-train-epochs = 3
train.training-arguments.max-steps = 10
train.training-arguments.save-steps = 1000
train.training-arguments.save-total-limit = 10
train.training-arguments.gradient-checkpointing = true
train.training-arguments.lr-scheduler-type = "constant"
train.frobnicate = 3
strategy.fraction-train = 0.1
strategy.fraction-evaluate = 0.0
num-server-rounds = 100

[tool.flwr.app.config.static]
dataset.name = "vicgalle/alpaca-gpt4"
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    path = tmp_path / "app" / "pyproject.toml"
    path.write_text(SOURCE, encoding="utf8")
    for name, count in (("train", 24), ("test", 4)):
        rows = [{"instruction": f"Name {WORDS[i % 10]}.", "input": "", "output": "It is that."} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def test_every_key_is_carried_over_or_named(source: Path, tmp_path: Path) -> None:
    """0.1 of 20 clients are 2 in a round; the peak of the learning rate is a number, and its floor has no place."""
    notes = import_flowertune(source, tmp_path / "out")
    job = load(tmp_path / "out" / "job.yaml")
    assert (job.clients.per_round, job.rounds, job.local.steps, job.local.lr) == (2, 100, 10, 5e-5)
    assert job.adapter.keys["rank"] == 32
    assert job.data.train == "vicgalle/alpaca-gpt4"
    assert job.local.checkpointing
    keys = {line.split(" = ")[0] for line in SOURCE.splitlines() if " = " in line} - {
        "name", "publisher", "serverapp", "clientapp",
    }  # fmt: skip
    assert keys == {key for key in (*notes.carried, *notes.changed, *notes.left) if "(" not in key} - {
        "tool.flwr.app.components"
    }
    assert "floor" in notes.left["train.learning-rate-min"]
    assert "unknown" in notes.left["train.frobnicate"]
    assert "data.test" in notes.left["(no key)"]
    assert source.read_text(encoding="utf8") == SOURCE


def test_an_imported_app_runs(source: Path, tmp_path: Path) -> None:
    base = str(EXAMPLES / "models/stories260K")
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    import_flowertune(source, tmp_path / "out", model=base, clients=4, **places)
    sets = ["rounds=1", "local.steps=1", "local.batch=2"]
    run = weft.run(load(tmp_path / "out" / "job.yaml", sets), tmp_path / "run", threads=1)
    assert run.results["clients"] == 4
    assert run.results["methods"]["federated"]["overall"]["loss"] > 0


def test_a_job_without_held_out_records_says_what_to_do(source: Path, tmp_path: Path) -> None:
    base, records = str(EXAMPLES / "models/stories260K"), str(tmp_path / "train.jsonl")
    import_flowertune(source, tmp_path / "out", model=base, train=records)
    with pytest.raises(JobError, match=r"data\.test"):
        weft.run(tmp_path / "out" / "job.yaml", tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "said"), [("[tool]", "has no"), ("= 3", "not TOML"), ("[tool.flwr.app.config]\nx = 1", "model.name")]
)
def test_another_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(text, encoding="utf8")
    with pytest.raises(JobError, match=said):
        import_flowertune(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf8")
    with pytest.raises(JobError, match="not empty"):
        import_flowertune(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_command_names_what_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["weft", "import", "flowertune", str(source), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    printed = capsys.readouterr().out
    assert "not carried over: train.learning-rate-min" in printed
    assert "weft run" in printed
    monkeypatch.setattr(sys, "argv", [*words[:2], "flowertunes", *words[3:]])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "did you mean `flowertune`" in capsys.readouterr().err
