"""The audit of a whole run: it sees memorised records, keeps to a private run's claim, and its command works."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft import Job
from weft.audit.canaries import audit_run, told, with_canaries
from weft.audit.one_run import Audit
from weft.cli import app
from weft.core.errors import JobError
from weft.prepare import prepare


@pytest.fixture
def strange(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return the small job with thirty test records, random letters to a number, which can only be learned by heart."""
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (30, 6), generator=draw).tolist()
    rows = [{"question": f"{i}?", "answer": "".join(map(chr, row)), "site": "site-0"} for i, row in enumerate(letters)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"]["split"] = {"iid": {"clients": 1}}
    return values | {"rounds": 1}


def test_memorised_records_are_found_and_the_command_says_so(
    strange: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every canary that is in stands there 4 times, for 10 epochs at a high rate: the attack tells most of them."""
    coins = iter([0, 1, 1, 0] * 10)
    monkeypatch.setattr("weft.audit.canaries.secrets.randbits", lambda bits: next(coins))
    strange["local"] = {"lr": 0.01, "batch": 8, "epochs": 10}
    strange["adapter"] = {"lora": {"rank": 8, "targets": "all-linear"}}
    run = weft.run(Job(**strange), tmp_path / "run")
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    app(["audit", str(tmp_path / "run"), "--repeat", "4"], standalone_mode=False)
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert found["auc"] > 0.75
    assert found["claimed"] is None
    assert not found["disproved"]
    assert "no better than chance" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert run.results["methods"]


def test_a_private_run_keeps_to_its_claim(strange: dict[str, Any], tmp_path: Path) -> None:
    strange["local"] = {"lr": 0.01, "batch": 8, "steps": 2, "dp": {"clip": 0.1, "noise": 4.0}}
    run = weft.run(Job(**strange), tmp_path / "run")
    found = audit_run(run, most=30)
    assert found["canaries"] == 30
    assert found["claimed"] == run.results["privacy"][0]["epsilon"]
    assert found["epsilon"] <= found["claimed"]


def test_a_broken_promise_is_said() -> None:
    claimed = [{"level": "record", "unit": "one record", "epsilon": 1.0}]
    found = Audit(2.5, 0.95, 100, 40, 40, 0.99)
    assert told(found, 1e-5, 1, claimed)["disproved"]
    assert not told(found, 1e-5, 3, claimed)["disproved"]
    assert told(found, 1e-5, 1, [])["claimed"] is None


def test_canaries_are_dealt_in_turn(job: Job) -> None:
    """Four canaries, twice each, to three clients: 4, 2 and 2 more records; copies stay together."""
    prepared = prepare(job)
    planted = with_canaries(prepared, [0, 1, 2, 3], 2)
    more = [len(planted.clients[name]) - len(prepared.clients[name]) for name in prepared.clients]
    assert more == [4, 2, 2]
    assert len(planted.train.records) == len(prepared.train.records) + 8


def test_what_cannot_be_audited(values: dict[str, Any], tmp_path: Path) -> None:
    values["rounds"] = 1
    run = weft.run(Job(**values), tmp_path / "run")
    with pytest.raises(JobError, match="6 records are too few canaries"):
        audit_run(run)
