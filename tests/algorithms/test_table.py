"""docs/algorithms.md: its table says what the code declares, and names every algorithm."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from weft import plugins
from weft.algorithms.fedavg import fedavg
from weft.algorithms.krum import krum
from weft.algorithms.scaffold import scaffold

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "algorithm_table.py"
TABLE = runpy.run_path(str(SCRIPT))


def cells(name: str) -> list[str]:
    return [cell.strip() for cell in TABLE["row"](name).strip("|").split("|")]


@pytest.mark.parametrize("page", ["PAGE", "TESTS"])
def test_the_page_is_current(page: str) -> None:
    text = TABLE[page].read_text(encoding="utf8")
    assert TABLE["page"](text) == text, "run python benchmarks/algorithm_table.py"


def test_every_algorithm_is_tested_in_at_least_three_sentences() -> None:
    for name in plugins.names("algorithm"):
        assert sum(len(TABLE["sentences"](path)) for path in TABLE["files_of"](name)) >= 3, name


def pairs(name: str) -> list[str]:
    return [cell.strip() for cell in TABLE["pair"](name).strip("|").split("|")][1:]


def test_what_rules_go_with_that_is_known() -> None:
    """Of the definitions: what needs each client's factors sees no sums; control variates and turns know no staleness;
    a zero that stands for nothing is no update to noise.
    """
    assert pairs("fedavg") == ["yes", "yes", "yes", "no", "yes", "yes", "yes", "yes", "yes", "yes"]
    assert pairs("ffa_lora")[:5] == ["yes", "yes", "yes", "yes", "yes"]
    assert pairs("flora")[:5] == ["no", "no", "yes", "yes", "no"]
    assert pairs("scaffold") == ["yes", "yes", "yes", "no", "no", "yes", "no", "no", "yes", "yes"]
    assert pairs("rolora")[4] == pairs("fednova")[4] == pairs("krum")[4] == "no"
    assert pairs("krum")[5] == pairs("trimmed_mean")[5] == "no"
    assert pairs("ifca")[:3] == ["no", "no", "no"]
    assert pairs("task_experts")[:3] == ["no", "no", "yes"]
    assert pairs("ditto")[2] == pairs("fed_dpa")[2] == "no"
    assert pairs("fednova")[:2] == ["no", "no"]


def test_every_algorithm_has_a_row() -> None:
    text = TABLE["PAGE"].read_text(encoding="utf8")
    assert [name for name in plugins.names("algorithm") if f"| `{name}` |" not in text] == []


def test_rows_that_are_known() -> None:
    """Read off the definitions: scaffold sends and keeps an adapter and as much again, krum needs 2 f + 3 replies."""
    assert cells("fedavg") == ["`fedavg`", "any", "one for all", "any", "any", "yes", "no", "0", "P", "P"]
    assert cells("scaffold")[3:] == [
        "sgd without momentum",
        "all, or any by `weigh: uniform`",
        "yes",
        "no",
        "P",
        "2 P",
        "2 P",
    ]
    assert cells("krum")[4:6] == ["5 or more", "no"]
    assert cells("fednova")[8] == "P + 1 number"
    assert cells("ditto")[6:] == ["yes", "P", "P", "P"]
    assert cells("local")[5:] == ["nothing is sent", "yes", "P", "0", "0"]


def test_a_changed_declaration_changes_the_row() -> None:
    """Controls: what is measured follows the algorithm, not its name."""
    assert TABLE["optimizers"](replace(scaffold(), check=fedavg().check)) == "any"
    assert TABLE["cohorts"](krum(byzantine=2)) == "7 or more"
    assert not TABLE["takes"](krum(byzantine=2), per_round=6)
    twice = replace(fedavg(), cut=lambda update: {**update, "again": update["adapter"]})
    amounts = [TABLE["amount"](state) for state in TABLE["traffic"](twice).up]
    assert amounts == ["2 P"] * 4


def test_an_outdated_page_is_found() -> None:
    text = TABLE["PAGE"].read_text(encoding="utf8")
    assert TABLE["page"](text.replace("| 5 or more |", "| any |")) == TABLE["page"](text)
    assert text.replace("| 5 or more |", "| any |") != TABLE["page"](text)
