"""preference: the base's log-probabilities, the DPO loss by hand, blocks, resume, and pairs that are learned."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from tests.adapters.test_training import apart, trained
from weft import Job
from weft.core.errors import JobError
from weft.core.task import Example, Probe
from weft.plugins import build, parse
from weft.prepare import prepare, set_up
from weft.runs import load_base
from weft.site.cohort import Cohort
from weft.site.model import Loaded, equip
from weft.tasks import preference as dpo
from weft.tasks.preference import REFERENCE, preference
from weft.testing.families import RECIPE, double, equipped, tiny
from weft.testing.tiny import RECORDS, tokenizer

ADAPTERS: list[dict[str, Any]] = [
    {"lora": {"rank": 2}},
    {"lora": {"rank": 2, "dora": True}},
    {"lora": {"rank": 2, "init": "pissa"}},
    {"ia3": None},
    {"bottleneck": {"size": 4}},
    {"prompt": {"tokens": 3}},
    {"prefix": {"tokens": 3}},
    {"full": None},
]


@pytest.fixture
def pairs(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a small job of three clients with preference pairs."""
    for part in ("train", "test"):
        rows = [json.dumps(record) + "\n" for record in RECORDS[: 12 if part == "train" else 6]]
        (tmp_path / f"{part}.jsonl").write_text("".join(rows), encoding="utf8")
    values["task"] = {"preference": {"max_length": 64}}
    values["data"]["split"] = {"by": "source"}
    values["evaluate"] = {}
    return values


def log_probability(net: Any, ids: Tensor, labels: Tensor) -> float:
    """Return log p of an answer, token by token."""
    with torch.no_grad():
        found = net(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(float(found[i - 1, ids[i]]) for i in range(1, len(ids)) if labels[i] != -100)


def both(net: Any, pair: Example) -> list[float]:
    return [log_probability(net, pair[f"{which}ids"], pair[f"{which}labels"]) for which in ("", "rejected_")]


# --- the reference


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: str(next(iter(adapter.items()))))
def test_the_reference_is_the_base(adapter: dict[str, Any]) -> None:
    """Read with the adapter on the model, it is what the plain base says of each answer, to 1e-9 in float64.

    pissa takes its first factors out of the base in float32, so what is left and they together are the base to 1e-7.
    """
    task = preference(max_length=64)
    loaded = double(equipped(build(parse("adapter", adapter), "adapter"), task, "llama"))
    pairs = task.encode(loaded.tokenizer, RECORDS[:6], ()).examples
    plain: Any = copy.deepcopy(tiny("llama", task.auto)).double()  # type: ignore[union-attr]
    moved = {name: value + 0.05 for name, value in loaded.initial.items()}
    referred = loaded.referred(task, pairs, 4)
    for pair in referred:
        assert pair[REFERENCE].tolist() == pytest.approx(both(plain, pair), abs=1e-4 if "lora" in adapter else 1e-9)
    if "full" in adapter or adapter.get("lora", {}) == {"rank": 2, "init": "pissa"}:
        return  # what is trained cannot be switched off: the reference is asked before the first round
    with loaded.holding(moved):
        again = loaded.referred(task, pairs, 4)
    assert all(torch.equal(one[REFERENCE], two[REFERENCE]) for one, two in zip(referred, again, strict=True))


def test_a_prepared_job_has_the_base_s_own_bits(pairs: dict[str, Any]) -> None:
    """The same batches through a base that never had an adapter: the same bits; the pretrained base in float32."""
    bench = set_up(prepare(Job(**pairs)))
    net, words = load_base(bench.prepared.job, ())
    for rows in (*(rows.examples for rows in bench.train.values()), *bench.test.values()):
        bare = [{key: value for key, value in row.items() if key != REFERENCE} for row in rows]
        plain = dpo._refer(net.eval(), bare, words.pad_token_id, 32)
        assert all(torch.equal(one[REFERENCE], two[REFERENCE]) for one, two in zip(rows, plain, strict=True))


def test_the_first_loss_is_log_2_and_the_margin_is_zero(pairs: dict[str, Any], tmp_path: Path) -> None:
    """Before training both rewards are zero: -log sigmoid(0) = log 2."""
    run = weft.run(Job(**pairs), tmp_path / "run")
    first = run.results["methods"]["untrained"]["overall"]
    assert first == pytest.approx({"loss": math.log(2), "reward_margin": 0, "reward_accuracy": 0.5}, abs=1e-5)
    assert run.results["methods"]["federated"]["overall"]["reward_margin"] > 0.1


# --- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_the_metrics_by_hand(smoothing: float) -> None:
    """Margins are beta ((c - c0) - (r - r0)); the loss is -(1 - s) log sigmoid(m) - s log sigmoid(-m)."""
    task = preference(beta=0.5, smoothing=smoothing, max_length=64)
    net: Any = copy.deepcopy(tiny("llama", task.auto)).double().eval().requires_grad_(False)  # type: ignore[union-attr]
    words = tokenizer()
    base = [torch.tensor([-20.0, -30.0]), torch.tensor([-60.0, -5.0]), torch.tensor([-40.0, -40.0])]
    rows = task.encode(words, RECORDS[:3], ()).examples
    rows = [{**row, REFERENCE: known.double()} for row, known in zip(rows, base, strict=True)]
    expected, margins = [], []
    for row in rows:
        c, r = both(net, row)
        c0, r0 = row[REFERENCE].tolist()
        margins.append(0.5 * ((c - c0) - (r - r0)))
        odds = 1 / (1 + math.exp(-margins[-1]))
        expected.append(-(1 - smoothing) * math.log(odds) - smoothing * math.log(1 - odds))
    total, count = task.loss(net, task.collate([rows[:2], rows[2:]], words.pad_token_id))
    assert total.tolist() == pytest.approx([expected[0] + expected[1], expected[2]], rel=1e-9)
    assert count.tolist() == [2, 1]
    found = task.summarize(task.measure(Probe(net, words, 2, 4, None), rows, task.metrics))
    assert found["reward_margin"] == pytest.approx(sum(margins) / 3)
    assert found["reward_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)


def test_both_answers_lose_the_same_tokens_of_a_long_prompt() -> None:
    """20 tokens: the long answer leaves room for 10 of the prompt's 40, so the short one is read after the same 10."""
    record = {"prompt": "p" * 20 + "q" * 20, "chosen": "a" * 30, "rejected": "b"}
    (pair,) = preference(max_length=20).encode(tokenizer(), [record], ()).examples
    kept = [[int(label == -100) for label in pair[f"{which}labels"].tolist()].count(1) for which in ("", "rejected_")]
    assert kept == [10, 10]
    assert pair["ids"][:10].tolist() == pair["rejected_ids"][:10].tolist()
    assert len(pair["ids"]) == 20


def test_an_error_names_the_task() -> None:
    with pytest.raises(JobError, match=r"^task\.preference\.template: chat needs a chat template"):
        preference(template="chat").encode(tokenizer(), RECORDS[:1], ())


# --- blocks, resume


def prepared(adapter: dict[str, Any], family: str = "llama") -> tuple[Cohort, dict[str, list[Example]]]:
    """Return an engine in float64 and three clients with 4, 3 and 2 pairs."""
    task = preference(max_length=48)
    loaded = double(equipped(build(parse("adapter", adapter), "adapter"), task, family))
    rows = loaded.referred(task, task.encode(loaded.tokenizer, RECORDS[:9], ()).examples, 4)
    recipe = replace(RECIPE, optimizer="adamw", lr=1e-3, clip=0.05)
    data = {"a": rows[:4], "b": rows[4:7], "c": rows[7:9]}
    return Cohort(loaded, task, recipe, 3, "padded", loaded.lift), data


@pytest.mark.parametrize(
    "adapter", [{"lora": {"rank": 2, "dropout": 0.3}}, {"prompt": {"tokens": 3}}, {"full": None}], ids=str
)
@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_a_block_equals_its_clients_one_by_one(adapter: dict[str, Any], mode: Any) -> None:
    """Two rows a pair, dropout in each; clients end a thousand times further apart than blocks."""
    if mode == "packed" and "prompt" in adapter:
        pytest.skip("virtual tokens are never packed")
    cohort, data = prepared(adapter)
    alone = trained(replace(cohort, mode="single"), data, 1)
    if "dropout" in str(adapter) and mode == "packed":
        alone = trained(replace(cohort, mode="packed"), data, 1)  # whose draws differ from padded ones
    assert apart(alone, trained(replace(cohort, mode=mode), data, 3)) < 1e-7
    assert apart({"a": alone["a"]}, {"a": alone["b"]}) > 1e-4


def test_a_reference_of_another_pair_is_found() -> None:
    """The control: pairs whose references are swapped train to something else."""
    cohort, data = prepared({"lora": {"rank": 2}})
    swapped = {
        name: [{**row, REFERENCE: rows[i - 1][REFERENCE]} for i, row in enumerate(rows)] for name, rows in data.items()
    }
    assert apart(trained(cohort, data, 3), trained(cohort, swapped, 3)) > 1e-5


def test_a_resumed_run_has_the_same_bytes(pairs: dict[str, Any], tmp_path: Path) -> None:
    """The process ends after round 1; the references are read anew from the base, bit for bit."""
    whole = weft.run(Job(**pairs), tmp_path / "whole")
    commit = weft.store.Store.commit

    class Ended(BaseException):
        pass

    def deadly(self: Any, server: Any, record: Any) -> None:
        commit(self, server, record)
        if server.round == 1:
            raise Ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.store.Store.commit", deadly)
        with pytest.raises(Ended):
            weft.run(Job(**pairs), tmp_path / "cut")
    cut = weft.run(Job(**pairs), tmp_path / "cut", resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (whole.folder / name).read_bytes() == (cut.folder / name).read_bytes()
    assert whole.results["methods"] == cut.results["methods"]


# --- asked once


def test_the_base_is_asked_once(pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    base = Loaded.base
    monkeypatch.setattr(Loaded, "base", lambda self: asked.append(1) or base(self))  # type: ignore[func-returns-value]
    bench = set_up(prepare(Job(**pairs)))
    assert len(asked) == len(bench.train) + len(bench.prepared.groups)


def test_a_base_in_half_precision() -> None:
    task = preference(max_length=48)
    made: Any = copy.deepcopy(tiny("llama", task.auto)).to(torch.bfloat16)  # type: ignore[union-attr]
    loaded = equip(made, tokenizer(), build(parse("adapter", "lora"), "adapter"), task, 7)
    rows = loaded.referred(task, task.encode(loaded.tokenizer, RECORDS[:2], ()).examples, 4)
    assert rows[0][REFERENCE].dtype == torch.float32
