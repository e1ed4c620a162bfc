"""Whole runs of the small job: what comes out, what it equals, and what it must not depend on."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import weft
from tests.conftest import EXAMPLES
from weft import Job, Run
from weft.core.types import Order, Reply
from weft.export import export
from weft.journal import read as read_journal
from weft.links.local import Local
from weft.site.site import Site

CLASSIFY = {
    "model": {"name": str(EXAMPLES / "models" / "tiny-bert"), "random": True},
    "task": {"classification": {"max_length": 32}},
    "data": {
        "train": str(EXAMPLES / "data" / "banking77" / "train.jsonl"),
        "test": str(EXAMPLES / "data" / "banking77" / "test.jsonl"),
        "split": {"dirichlet": {"alpha": 0.5, "clients": 3}},
    },
    "adapter": {"lora": {"rank": 2}},
    "rounds": 2,
    "local": {"steps": 2},
}


def adapter_hash(run: Run) -> str:
    return hashlib.sha256((run.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_leaves_everything_behind(values: dict[str, Any], tmp_path: Path) -> None:
    values["baselines"], values["evaluate"] = ["untrained", "local", "centralized"], {"max_new_tokens": 4}
    run = weft.run(Job(**values), tmp_path / "run")
    present = {path.name for path in run.folder.iterdir()}
    assert {
        "job.yaml",
        "split.json",
        "journal.jsonl",
        "checkpoints",
        "adapter",
        "results.json",
        "report.html",
    } <= present
    assert set(run.results["methods"]) == {"untrained", "local", "centralized", "federated"}
    scores = {name: rows["overall"]["loss"] for name, rows in run.results["methods"].items()}
    assert scores["federated"] < scores["untrained"]
    overall = run.results["methods"]["federated"]["overall"]
    assert {"loss", "perplexity", "rouge1", "rouge2", "rougeL", "bleu4", "exact_match"} == set(overall)
    frame = pandas.DataFrame(run.history)
    assert list(frame["round"]) == [0, 1, 2, 3]
    assert frame["test_loss"].iloc[-1] == overall["loss"]
    rows = read_journal(run.folder / "journal.jsonl")
    assert rows[1]["cohort"] == ["site-0", "site-1", "site-2"]
    assert rows[1]["bytes_up"] == sum(client["bytes_up"] for client in rows[1]["clients"].values()) > 0
    assert rows[1]["aggregation_error"] > 0
    assert rows[1]["peak_memory_mb"] > 0


def test_a_job_in_a_file_runs_like_one_in_code(values: dict[str, Any], tmp_path: Path) -> None:
    first = weft.run(Job(**values), tmp_path / "one")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "folder"}))
    assert adapter_hash(weft.run(tmp_path / "job.yaml", tmp_path / "two")) == adapter_hash(first)


def test_plain_peft_loads_the_adapter_with_the_same_logits(values: dict[str, Any], tmp_path: Path) -> None:
    """And plain transformers loads the merged model; alpha/rank is 3 here, so a dropped scale would show."""
    from peft import PeftModel

    run = weft.run(Job(**values), tmp_path / "run")
    folder = EXAMPLES / "models" / "stories260K"
    ids = AutoTokenizer.from_pretrained(folder)("Question: What is gout?\nAnswer:", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(folder)
    untrained = base(ids).logits.detach()
    theirs = PeftModel.from_pretrained(base, run.folder / "adapter").eval()(ids).logits.detach()
    ours = logits_of(run, ids)
    merged = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "merged", merge=True))(ids).logits.detach()
    assert float((theirs - ours).abs().max()) <= 1e-5
    assert float((merged - ours).abs().max()) <= 1e-4
    assert float((untrained - ours).abs().max()) > 1e-2
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def logits_of(run: Run, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of Weft's own model holding the run's last checkpoint."""
    from weft.prepare import prepare, set_up
    from weft.store import Store

    bench = set_up(prepare(run.job))
    server, _ = Store(run.folder, run.job.hash()).latest()
    assert server is not None
    with bench.loaded.holding(server.state["adapter"]) as net, torch.no_grad():
        logits: torch.Tensor = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits


def test_the_head_of_a_classifier_travels_and_is_saved(tmp_path: Path) -> None:
    from peft import PeftModel

    run = weft.run(Job(**CLASSIFY), tmp_path / "run")
    assert {"loss", "accuracy", "macro_f1"} == set(run.results["methods"]["federated"]["overall"])
    classes = len(run.results["classes"])
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    torch.manual_seed(99)
    base, _ = run.base()
    assert isinstance(base, AutoModelForSequenceClassification.from_config(base.config).__class__)
    theirs = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    assert theirs(input_ids=ids).logits.shape == (1, classes)
    assert float((theirs(input_ids=ids).logits.detach() - logits_of(run, ids)).abs().max()) <= 1e-5
    assert any("classifier" in name for name in run.adapter())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_client_with_all_data_is_centralized_training(
    values: dict[str, Any], tmp_path: Path, optimizer: str
) -> None:
    """Bit for bit, in every round: the exact mean of one update is that update, and the batches are the same."""
    values["data"]["split"] = {"iid": {"clients": 1}}
    values["local"] |= {"optimizer": optimizer, "lr": 0.05, "moments": "keep"}
    values["baselines"] = ["centralized"]
    run = weft.run(Job(**values), tmp_path / "run")
    ours, theirs = (
        sorted((folder / "checkpoints").iterdir()) for folder in (run.folder, run.folder / "baselines/centralized")
    )
    assert len(ours) == 2
    for left, right in zip(ours, theirs, strict=True):
        assert tensors(left) == tensors(right)
    losses = [
        [row["train_loss"] for row in Run(folder).history[1:]]
        for folder in (run.folder, run.folder / "baselines/centralized")
    ]
    assert losses[0] == losses[1]


def tensors(path: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def test_centralized_training_is_a_plain_loop(values: dict[str, Any], tmp_path: Path) -> None:
    """The baseline against one uninterrupted loop over all rounds that knows nothing of rounds or servers."""
    from weft.core import trees
    from weft.prepare import prepare, set_up
    from weft.site.cohort import Cohort
    from weft.store import Store

    values["data"]["split"] = {"iid": {"clients": 1}}
    values["local"] |= {"optimizer": "sgd", "lr": 0.05}
    values["baselines"] = []
    run = weft.run(Job(**values), tmp_path / "run")
    bench = set_up(prepare(Job(**values)))
    cohort = Cohort(bench.loaded, bench.prepared.task, bench.prepared.plan.recipe, 3, bench.mode, bench.loaded.lift)
    (name,) = bench.train
    params = trees.expand({n: p.detach() for n, p in bench.loaded.initial.items()}, 1)
    for round_ in (1, 2, 3):
        params = cohort.train(round_, {name: bench.train[name].examples}, params, {}, None).params
    server, _ = Store(run.folder, run.job.hash()).latest()
    assert server is not None
    assert all(torch.equal(server.state["adapter"][n], params[n][0]) for n in params)


@pytest.mark.parametrize("how", ["replies reversed", "clients reversed"])
def test_order_does_not_matter(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    expected = adapter_hash(weft.run(job, tmp_path / "plain"))
    exchange, blocks = Local.exchange, Site.blocks

    def reversed_replies(self: Local, order: Order) -> Iterator[Reply]:
        return iter(list(exchange(self, order))[::-1])

    if how == "replies reversed":
        monkeypatch.setattr(Local, "exchange", reversed_replies)
    else:
        monkeypatch.setattr(Site, "blocks", lambda self, order: blocks(self, order)[::-1])
    assert adapter_hash(weft.run(job, tmp_path / "other")) == expected


def test_another_seed_matters(values: dict[str, Any], job: Job, tmp_path: Path) -> None:
    """Negative control of the two tests above."""
    expected = adapter_hash(weft.run(job, tmp_path / "plain"))
    assert adapter_hash(weft.run(Job(**{**values, "seed": 4}), tmp_path / "other")) != expected


def test_the_hash_seed_of_python_does_not_matter(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "folder"}))
    hashes = set()
    for seed in ("0", "12345"):
        out = tmp_path / f"run-{seed}"
        command = [sys.executable, "-m", "weft.cli", "run", str(tmp_path / "job.yaml"), "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        config = hashlib.sha256((out / "adapter" / "adapter_config.json").read_bytes()).hexdigest()
        hashes.add((adapter_hash(Run(out)), config))
    assert len(hashes) == 1


def test_blocks_agree_within_rounding(values: dict[str, Any], tmp_path: Path) -> None:
    values["local"] |= {"optimizer": "sgd", "lr": 0.1}
    alone, together = (weft.run(Job(**values), tmp_path / f"b{block}", block=block) for block in (1, 3))
    difference = max(float((alone.adapter()[n] - together.adapter()[n]).abs().max()) for n in alone.adapter())
    assert difference < 1e-5


def test_a_personal_method_serves_each_client_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    values["baselines"] = ["local"]
    run = weft.run(Job(**values), tmp_path / "run")
    local = run.results["methods"]["local"]
    assert set(local["clients"]) == {"site-0", "site-1", "site-2"}
    assert local["overall"]["loss"] == pytest.approx(sum(row["loss"] for row in local["clients"].values()) / 3)
    assert len({row["loss"] for row in local["clients"].values()}) == 3
    rows = read_journal(run.folder / "baselines" / "local" / "journal.jsonl")
    assert all(row.get("bytes_up", 0) == row.get("bytes_down", 0) == 0 for row in rows)


def test_the_manifest_says_where_each_record_went(job: Job, tmp_path: Path) -> None:
    run = weft.run(job, tmp_path / "run")
    split = json.loads((run.folder / "split.json").read_text())
    assert sorted(i for client in split["clients"].values() for i in client["records"]) == list(range(14))
    assert split["clients"]["site-0"]["records"] == [0, 3, 6, 9, 12]
    assert split["test_groups"] == {"site-0": 2, "site-1": 2, "site-2": 2}
