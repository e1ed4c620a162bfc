"""The ledger: to the byte what the messages are, per round, client and direction; and a budget that ends a run."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.test_runs import adapter_hash
from weft import Job, journal, ledger
from weft.core.errors import PolicyError
from weft.core.types import Order, Reply
from weft.links import letters, wire
from weft.links.local import Local
from weft.watch import Watch

PIPELINES: list[tuple[list[Any], list[Any], str]] = [
    (["weigh"], [], "fedavg"),
    (["delta", {"topk": 0.1}, {"quantize": 8}, {"zstd": 19}, "weigh"], [{"quantize": 4}, "zstd"], "fedavg"),
    (["delta", {"clip": 0.1}, {"random_mask": 0.2}, {"weigh": "uniform"}], [{"lowrank": 1}], "ffa_lora"),
    ([{"quantize": 4}, "weigh"], [{"quantize": 8}], "flora"),
]
Seen = dict[tuple[int, str, str], int]


def watched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Keep the length of every training message of a run: (round, client, way) -> bytes."""
    seen: Seen = defaultdict(int)

    def watch(way: str, client: str, message: bytes) -> None:
        tree = letters.opened(message, ("order",) if way == "down" else ("replies",), "")
        told = tree if way == "down" else tree["replies"][0]
        if told.get("kind") == "train" or told.get("measured") == {}:
            seen[told["round"], client, way] += len(message)

    monkeypatch.setattr("weft.prepare.Local", partial(Local, watch=watch))
    return seen


def told(run: weft.Run) -> Seen:
    """Return what the journal says."""
    return {
        (row["round"], client, way): entry[f"bytes_{way}"]
        for row in journal.read(run.folder / "journal.jsonl")
        for client, entry in row.get("clients", {}).items()
        for way in ("up", "down")
    }


@pytest.mark.parametrize(("up", "down", "algorithm"), PIPELINES, ids=["plain", "topk", "mask", "flora"])
def test_to_the_byte(
    up: list[Any],
    down: list[Any],
    algorithm: str,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every message is opened, its round and client read from it, and its length compared."""
    values |= {"pipeline": up, "downlink": down, "algorithm": algorithm, "rounds": 3, "baselines": []}
    seen = watched(monkeypatch)
    run = weft.run(Job(**values), tmp_path / "run")
    assert told(run) == seen
    assert len(seen) == 3 * 3 * 2
    rows = journal.read(run.folder / "journal.jsonl")
    assert ledger.rounds(run.folder / "journal.jsonl") == [
        sum(size for (number, _, _), size in seen.items() if number == row["round"]) for row in rows[1:]
    ]
    assert sum(run.results["bytes"].values()) == sum(seen.values())


def test_a_ledger_of_tensors_alone_would_show(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what only counts tensors is too small for every message."""
    values["baselines"] = []
    seen = watched(monkeypatch)

    class Tensors(Local):
        def exchange(self, order: Order) -> Iterator[Reply]:
            for reply in super().exchange(order):
                yield replace(reply, bytes_up=len(wire.pack(reply.update)), bytes_down=len(wire.pack(order.state)))

    watch = weft.prepare.Local.keywords["watch"]  # type: ignore[attr-defined]
    monkeypatch.setattr("weft.prepare.Local", partial(Tensors, watch=watch))
    run = weft.run(Job(**values), tmp_path / "run")
    assert told(run).keys() >= seen.keys()
    assert told(run) != seen


def test_lost_and_repeated_messages_count(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that fails three times has cost three orders and three replies, though nothing of it is counted."""
    values |= {"failures": {"on_client_failure": "retry", "retries": 2}, "rounds": 1, "baselines": []}
    seen = watched(monkeypatch)
    train = weft.site.site.Site._train  # type: ignore[attr-defined]

    def failing(site: Any, order: Any, clients: Any, cohort: Any) -> Any:
        if "site-1" in clients:
            raise weft.core.errors.RunError("the disk is full")  # type: ignore[attr-defined]
        return train(site, order, clients, cohort)

    monkeypatch.setattr("weft.site.site.Site._train", failing)
    run = weft.run(Job(**values), tmp_path / "run")
    row = journal.read(run.folder / "journal.jsonl")[1]
    assert list(row["bytes_lost"]) == ["site-1"]
    assert row["bytes_lost"]["site-1"] == [seen[1, "site-1", "up"], seen[1, "site-1", "down"]]
    assert row["bytes_up"] + row["bytes_down"] == sum(seen.values())


class Notes(Watch):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


def test_a_budget_ends_the_run_with_results(values: dict[str, Any], tmp_path: Path) -> None:
    """Room for two rounds and a half of four: two are run, and the adapter is that of a job of two rounds."""
    values |= {"rounds": 4, "baselines": []}
    whole = weft.run(Job(**values), tmp_path / "whole")
    each = ledger.rounds(whole.folder / "journal.jsonl")
    assert whole.results["stopped"] is None
    values["budget"] = {"megabytes": 2.5 * each[0] / 1e6}
    notes = Notes()
    run = weft.run(Job(**values), tmp_path / "run", watch=notes)
    assert [row["round"] for row in run.history] == [0, 1, 2]
    assert run.results["rounds"] == 2
    assert run.results["stopped"] in notes.notices
    assert "are spent after round 2, and another round takes" in run.results["stopped"]
    assert f"Ended by {run.results['stopped']}" in (run.folder / "report.html").read_text(encoding="utf8")
    assert run.results["methods"]["federated"]["overall"]["loss"] > 0
    del values["budget"]
    two = weft.run(Job(**values | {"rounds": 2}), tmp_path / "two")
    assert adapter_hash(run) == adapter_hash(two)


def test_a_stopped_run_stays_stopped_and_a_higher_budget_is_another_job(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"rounds": 3, "baselines": [], "budget": {"megabytes": 1e-3}}
    run = weft.run(Job(**values), tmp_path / "run")
    assert run.results["rounds"] == 1  # how large a round is shows with the first
    again = weft.run(Job(**values), tmp_path / "run", resume=True)
    assert again.results["rounds"] == 1
    with pytest.raises(PolicyError, match=r"changed: budget.megabytes"):
        weft.run(Job(**values | {"budget": {"megabytes": 10.0}}), tmp_path / "run", resume=True)


def test_what_check_forecasts_is_what_a_round_takes(values: dict[str, Any], tmp_path: Path) -> None:
    """But for the digits of a weight and a number of records."""
    from weft.prepare import prepare, set_up

    values |= {"pipeline": ["delta", {"topk": 0.1}, {"quantize": 8}, "weigh"], "downlink": [{"quantize": 4}]}
    values |= {"rounds": 1, "baselines": []}
    bench = set_up(prepare(Job(**values)))
    first = {name: tensor.detach().cpu() for name, tensor in bench.loaded.initial.items()}
    up, down = ledger.forecast(replace(bench.prepared.federation(), initial=first))
    run = weft.run(Job(**values), tmp_path / "run")
    for client in journal.read(run.folder / "journal.jsonl")[1]["clients"].values():
        assert -5 < client["bytes_up"] - up < 5
        assert client["bytes_down"] == down
