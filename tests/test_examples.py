"""The examples: sound at full size, and each runs, made small, to a report and an adapter that learned something."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import weft
from weft.job import load
from weft.prepare import prepare, set_up
from weft.site import model

EXAMPLES = Path(__file__).parents[1] / "examples"
JOBS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
ROUNDS = {  # so many that the loss of the test records falls
    "medquad.yaml": 1,
    "banking77.yaml": 3,
    "secure.yaml": 1,
    "preference.yaml": 4,
    "emoji.yaml": 3,
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a copy of the examples with each fourth record."""
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder)
    for path in (folder / "data").glob("*/*.jsonl"):
        path.write_text("".join(path.read_text(encoding="utf8").splitlines(keepends=True)[::4]), encoding="utf8")
    return folder


def test_there_are_examples() -> None:
    assert {"medquad.yaml", "banking77.yaml", "emoji.yaml"} <= set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_an_example_is_sound_at_full_size(name: str) -> None:
    bench = set_up(prepare(load(EXAMPLES / name)))
    assert bench.notices == ()
    sizes = {"medquad.yaml": 9, "banking77.yaml": 8, "secure.yaml": 9, "emoji.yaml": 8}
    assert len(bench.train) == sizes.get(name, len(bench.train))


@pytest.mark.parametrize("name", JOBS)
def test_an_example_runs_to_the_end(name: str, small: Path, tmp_path: Path) -> None:
    sets = [f"rounds={ROUNDS.get(name, 1)}", "baselines=[untrained]", "evaluate.examples=1", "evaluate.every=0"]
    run = weft.run(load(small / name, sets), tmp_path / "run")
    methods = run.results["methods"]
    before, after = methods["untrained"]["overall"], methods["federated"]["overall"]
    assert after["loss"] < before["loss"]
    for metric in {"reward_margin", "reward_accuracy"} & set(after):  # on pairs that were never trained on
        assert after[metric] > before[metric] + 0.1
    assert (run.folder / "report.html").stat().st_size > 10_000
    assert run.adapter()


def test_one_base_serves_every_client_and_method(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine clients, the federation and three baselines: the network is made once."""
    made: list[object] = []
    network = model.network

    def counted(*given: Any) -> Any:
        made.append(network(*given))
        return made[-1]

    monkeypatch.setattr(model, "network", counted)
    sets = ["rounds=1", "local.steps=1", "evaluate.on=[loss]", "evaluate.every=0"]
    run = weft.run(load(small / "medquad.yaml", sets), tmp_path / "run")
    assert set(run.results["methods"]) == {"untrained", "local", "centralized", "federated"}
    assert run.results["clients"] == 9
    assert len(made) == 1


def test_every_example_has_its_source_and_licence() -> None:
    for folder in (*(EXAMPLES / "data").iterdir(), *(EXAMPLES / "models").iterdir()):
        text = (folder / "README.md").read_text(encoding="utf8")
        assert re.search(r"CC BY 4\.0|license: mit|Apache-2\.0", text), folder.name
    for path in EXAMPLES.glob("data/*/*.jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in path.read_text(encoding="utf8").splitlines())
