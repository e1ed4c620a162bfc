"""seq2seq: tokens and labels, the loss by hand, generation, blocks with dropout, and a whole run on a saved T5."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.adapters.test_training import apart, trained
from weft import Job
from weft.ask import ask
from weft.core.errors import JobError
from weft.core.task import Example, Probe
from weft.plugins import build, parse
from weft.site.cohort import Cohort
from weft.tasks.seq2seq import seq2seq
from weft.tasks.text_metrics import generate
from weft.testing.families import RECIPE, double, equipped, moved_by
from weft.testing.tiny import RECORDS, model, tokenizer

EOS = 2
WORDS = tokenizer()


def encoded(record: dict[str, Any], **keys: Any) -> Example:
    (example,) = seq2seq(**keys).encode(WORDS, [record], ()).examples
    return example


def ids(text: str) -> list[int]:
    result: list[int] = WORDS(text)["input_ids"]
    return result


def test_an_answer_ends_and_stands_alone() -> None:
    example = encoded({"prompt": "ab", "completion": " cd "})
    assert example["ids"].tolist() == ids("ab")
    assert example["labels"].tolist() == [*ids("cd"), EOS]
    assert example["reference"] == "cd"
    assert encoded({"question": "a", "answer": "b"}, template="to {question}")["ids"].tolist() == ids("to a")


def test_what_is_cut_is_counted() -> None:
    records = [
        {"prompt": "a" * 9, "completion": "b"},
        {"prompt": "a", "completion": "b" * 9},
        {"prompt": "a", "completion": "b"},
    ]
    found = seq2seq(max_length=8, max_answer=4).encode(WORDS, records, ())
    assert [(len(row["ids"]), len(row["labels"])) for row in found.examples] == [(8, 2), (1, 4), (1, 2)]
    assert (found.truncated, found.dropped) == (2, 0)


def test_the_loss_is_the_model_s_own() -> None:
    """The mean of transformers over one client's labels, times their number; the other client's rows change nothing."""
    task, net = seq2seq(), model("AutoModelForSeq2SeqLM")
    rows = task.encode(WORDS, RECORDS[:4], ()).examples
    total, count = task.loss(net, task.collate([rows[:1], rows[1:]], 0))
    for part, loss, number in zip((rows[:1], rows[1:]), total, count, strict=True):
        sums = [
            float(net(input_ids=row["ids"][None], labels=row["labels"][None]).loss) * len(row["labels"]) for row in part
        ]
        assert float(loss) == pytest.approx(sum(sums), rel=1e-4)
        assert int(number) == sum(len(row["labels"]) for row in part)


@pytest.mark.parametrize("adapter", [None, "prompt", "prefix", "lora"])
def test_generation_is_greedy_whatever_stands_beside_it(adapter: str | None) -> None:
    """Inputs of unlike length, alone and in one batch; one whole forward pass a token gives the same text."""
    task, net = seq2seq(), model("AutoModelForSeq2SeqLM")
    if adapter:
        loaded = equipped(build(parse("adapter", adapter), "adapter"), task, "t5")
        net = loaded.net
        net.get_base_model().lm_head.weight.data[:4] = 0  # so that no special token is written
        for name, value in moved_by(loaded.initial, 0.5).items():
            loaded.initial[name].data.copy_(value)
    rows = task.encode(WORDS, RECORDS[:4], ()).examples
    together = generate(Probe(net, WORDS, 4, 5, None), rows)
    assert together == [generate(Probe(net, WORDS, 1, 5, None), [row])[0] for row in rows]
    assert together == [_greedy(net, row["ids"]) for row in rows]
    assert any(together)


@torch.no_grad()
def _greedy(net: Any, given: torch.Tensor) -> str:
    answer = torch.tensor([[0]])
    for _ in range(5):
        mask = torch.ones_like(given[None])
        out = net(input_ids=given[None], attention_mask=mask, decoder_input_ids=answer, use_cache=False).logits
        answer = torch.cat([answer, out[:, -1:].argmax(-1)], 1)
        if int(answer[0, -1]) == EOS:
            break
    text: str = WORDS.decode(answer[0], skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    "adapter",
    [{"lora": {"rank": 2, "dropout": 0.3, "targets": "all-linear"}}, {"ia3": None}, {"prompt": {"tokens": 3}}],
    ids=str,
)
def test_a_block_equals_its_clients_one_by_one(adapter: dict[str, Any], family: str) -> None:
    """Encoder and decoder read rows of other lengths; each client's dropout is its own in both."""
    task = seq2seq(max_length=40, max_answer=48)
    loaded = double(equipped(build(parse("adapter", adapter), "adapter"), task, family))
    rows = task.encode(loaded.tokenizer, RECORDS[:9], ()).examples
    data = {"a": rows[:4], "b": rows[4:7], "c": rows[7:9]}
    cohort = Cohort(loaded, task, replace(RECIPE, optimizer="adamw", lr=1e-3), 3, "padded", loaded.lift)
    alone = trained(cohort, data, 1)
    assert apart(alone, trained(cohort, data, 3)) < 1e-7
    assert apart({"a": alone["a"]}, {"a": alone["b"]}) > 1e-4


def test_a_whole_run_on_a_saved_t5(values: dict[str, Any], tmp_path: Path) -> None:
    model("AutoModelForSeq2SeqLM").save_pretrained(tmp_path / "t5")  # type: ignore[operator]
    tokenizer().save_pretrained(tmp_path / "t5")
    rows = [json.dumps(record) + "\n" for record in RECORDS[:12]]
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(rows), encoding="utf8")
    values |= {"model": {"name": "t5"}, "task": {"seq2seq": {"max_length": 48}}, "adapter": {"lora": {"rank": 2}}}
    values["data"]["split"] = {"by": "source"}
    values["evaluate"] = {"on": ["loss", "rouge", "exact_match"], "examples": 2, "max_new_tokens": 4}
    run = weft.run(Job(**values), tmp_path / "run")
    before, after = (run.results["methods"][name]["overall"] for name in ("untrained", "federated"))
    assert after["loss"] < before["loss"]
    assert {"perplexity", "rougeL", "bleu4", "exact_match"} <= set(after)
    assert set(ask(run, "what is card 0", 4)) == {"untrained base", "federated"}
    assert "AutoModelForSeq2SeqLM" in (run.folder / "report.html").read_text(encoding="utf8")


def test_a_decoder_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be loaded as AutoModelForSeq2SeqLM"):
        weft.run(Job(**{**values, "task": "seq2seq"}), tmp_path / "run")
