"""A suite's file -> its cells."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from weft.core.errors import JobError
from weft.prepare import prepare, set_up
from weft.site.resident import Resident
from weft.suite.suite import Suite, load_suite

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "suites").glob("*.yaml"))


def write(folder: Path, values: dict[str, Any], **suite: Any) -> Path:
    """Write a suite over a job whose values hold its folder as well."""
    job = {key: value for key, value in values.items() if key != "folder"}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"job": job, **suite}, sort_keys=False), encoding="utf8")
    return path


def cells(suite: Suite) -> list[tuple[str, int]]:
    return [(cell.variant, cell.seed) for cell in suite.cells]


def test_every_value_meets_every_other(tmp_path: Path, values: dict[str, Any]) -> None:
    grid = {"local.lr": [1e-3, 1e-2], "rule": {"A": {"algorithm": "fedavg"}, "M": {"algorithm": "fedavgm"}}}
    suite = load_suite(write(tmp_path, values, grid=grid, seeds=[0, 5], set={"rounds": 2}))
    assert cells(suite) == [(f"lr {lr}, {rule}", seed) for lr in (0.001, 0.01) for rule in "AM" for seed in (0, 5)]
    last = suite.cells[-1].job
    assert (last.local.lr, last.algorithm.name, last.seed, last.rounds) == (0.01, "fedavgm", 5, 2)
    assert all(cell.job.evaluate.per_example for cell in suite.cells)
    assert len({cell.folder for cell in suite.cells}) == 8


def test_a_baseline_is_run_once_for_all_that_share_it(tmp_path: Path, values: dict[str, Any]) -> None:
    """The rule changes no baseline; the rate changes local and centralized training; nothing changes the untrained."""
    grid = {"local.lr": [1e-3, 1e-2], "rule": {"A": {"algorithm": "fedavg"}, "M": {"algorithm": "fedavgm"}}}
    wanted = {"baselines": ["untrained", "local", "centralized"]}
    suite = load_suite(write(tmp_path, values, grid=grid, set=wanted))
    assert [cell.job.baselines for cell in suite.cells] == [
        ("untrained", "local", "centralized"), (), ("local", "centralized"), (),
    ]  # fmt: skip
    found = [(b.method, b.labels) for b in suite.baselines]
    assert ("untrained", {}) in found
    assert ("local", {"local.lr": "lr 0.01"}) in found
    assert len(found) == 5


def test_cells_over_one_base_follow_each_other(tmp_path: Path, values: dict[str, Any]) -> None:
    base = values["model"]["name"]
    models = {"whole": {"model.name": base}, "half": {"model.dtype": "bfloat16"}}
    suite = load_suite(write(tmp_path, values, grid={"local.lr": [1e-3, 1e-2], "model": models}))
    assert [cell.labels["model"] for cell in suite.cells] == ["whole", "half"] * 2
    assert [cell.labels["model"] for cell in suite.ordered()] == ["whole", "whole", "half", "half"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sedes": [1]}, r"line \d+: sedes: unknown key; did you mean `seeds`"),
        ({"grid": {"evaluate.batch": [1, 2]}}, "the same for all cells"),
        ({"grid": {"x": {"a": {"data.test": "other.jsonl"}}}}, "the same for all cells"),
        ({"grid": {"seed": [1, 2]}}, "seeds"),
        ({"grid": {"local.lr": []}}, "holds no value"),
        ({"grid": {"local.batsh": [1]}}, "cell `batsh 1`.*did you mean `batch`"),
        ({"grid": {"adapter": [{"lora": {"rnak": 2}}]}}, "cell `lora`.*did you mean `rank`"),
        ({"seeds": [1, 1]}, "twice"),
        ({"job": "nowhere.yaml"}, "there is no job file"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(
    tmp_path: Path, values: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError, match=said):
        load_suite(write(tmp_path, values, **change))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_suite_is_sound(path: Path) -> None:
    """Every variant is set up, so that an adapter that its model refuses is found here."""
    suite, resident = load_suite(path), Resident()
    assert len(suite.keys.seeds) == 3
    for cell in suite.cells[:: len(suite.keys.seeds)]:
        assert set_up(prepare(cell.job), resident).notices == ()
    assert resident.loads == 1
