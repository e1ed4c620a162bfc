"""What model families differ in: default targets, grouped queries, tied embeddings, a missing or shared pad token."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.adapters.on_tiny import plain, put_on, trained
from weft import Job
from weft.adapters.lora import lora
from weft.adapters.prefix import prefix
from weft.cli import main
from weft.core import trees
from weft.core.task import Probe
from weft.plugins import build, parse
from weft.prepare import prepare, set_up
from weft.site.cohort import Cohort
from weft.site.model import Base, equip, tokenizer_of
from weft.tasks.causal_lm import IGNORE, causal_lm
from weft.tasks.text_metrics import generate
from weft.testing.families import DECODERS, RECIPE, config_of
from weft.testing.tiny import RECORDS, tokenizer

TARGETS = {"gpt2": {"c_attn"}, "bloom": {"query_key_value"}}
UNNAMED = ("phi3", "glm")


# --- default targets


@pytest.mark.parametrize("family", DECODERS)
def test_default_targets_are_those_that_peft_names(family: str) -> None:
    """Queries and values; a family that peft does not know has all linear layers but the head, and a notice."""
    adapter = lora(rank=2)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(put_on(adapter, family))}
    said = adapter.notice(plain(family))
    if family in UNNAMED:
        assert {"o_proj", "down_proj"} < layers
        assert "lm_head" not in layers
        assert said == f"peft names no layers for lora in the family {family}, so all linear ones are taken"
    else:
        assert layers == TARGETS.get(family, {"q_proj", "v_proj"})
        assert said is None
    assert lora(targets="all-linear").notice(plain(family)) is None


def saved(family: str, folder: Path, values: dict[str, Any], words: Any = None) -> Job:
    """Return a job on a tiny model of a family, with random weights from a saved configuration."""
    config_of(family).save_pretrained(folder / family)
    (words or tokenizer()).save_pretrained(folder / family)
    return Job(**{**values, "model": {"name": family, "random": True}, "adapter": {"lora": {"rank": 2}}})


def test_the_notice_reaches_the_run(values: dict[str, Any], tmp_path: Path) -> None:
    notices = set_up(prepare(saved("glm", tmp_path, values))).notices
    assert notices == ("peft names no layers for lora in the family glm, so all linear ones are taken",)


# --- refusals through the command


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("qwen3", {"adapter": "bitfit"}, "bitfit trains the biases that a model has, and Qwen3ForCausalLM has none"),
        ("bert", {}, "bert is an encoder, which reads the text after a token as well"),
        ("llama", {"task": "seq2seq"}, "llama cannot be loaded as AutoModelForSeq2SeqLM"),
    ],
)
def test_check_refuses_with_the_reason(
    family: str, changes: dict[str, Any], says: str, values: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    saved(family, tmp_path, values)
    job = {**values, "model": {"name": family, "random": True}, **changes}
    del job["folder"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["weft", "check", str(tmp_path / "job.yaml")])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


# --- grouped queries, tied embeddings


def test_grouped_queries() -> None:
    """Two query heads of 8 share one key and value head: B of v_proj is (8, rank), a prefix has 2 x 2 x 8 numbers."""
    shapes = {name: tuple(p.shape) for name, p in trained(put_on(lora(rank=2, targets=["q_proj", "v_proj"]))).items()}
    assert {shape for name, shape in shapes.items() if "q_proj.lora_B" in name} == {(16, 2)}
    assert {shape for name, shape in shapes.items() if "v_proj.lora_B" in name} == {(8, 2)}
    assert [tuple(p.shape) for p in trained(put_on(prefix(tokens=3))).values()] == [(3, 2 * 2 * 8)]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_tied_embeddings_stay_tied(adapter: str) -> None:
    """GPT-2 trained in blocks: a tied table is one tensor, read at both ends; LoRA leaves it alone."""
    task = causal_lm(max_length=32)
    loaded = equip(copy.deepcopy(plain("gpt2")), tokenizer(), build(parse("adapter", adapter), "adapter"), task, 7)
    inner = loaded.net.get_base_model() if adapter == "lora" else loaded.net
    rows = task.encode(tokenizer(), RECORDS[:4], ()).examples
    cohort = Cohort(loaded, task, RECIPE, 7, "padded", loaded.lift)
    start = trees.expand({name: p.detach() for name, p in loaded.initial.items()}, 2)
    out = cohort.train(1, {"a": rows[:2], "b": rows[2:]}, start, {}, None).params
    assert [name for name in out if "wte" in name or "lm_head" in name] == (
        ["transformer.wte.weight"] if adapter == "full" else []
    )
    with loaded.holding(trees.pick(out, 0)):
        assert inner.lm_head.weight is inner.transformer.wte.weight


# --- the pad token


def without_pad() -> Any:
    words = tokenizer()
    words.pad_token = None
    return words


def test_a_missing_pad_token_changes_no_loss(values: dict[str, Any], tmp_path: Path) -> None:
    """The end token pads in its place; masks hide it, so the batch has the loss that a pad of its own gives."""
    saved("llama", tmp_path, values, without_pad())
    words = tokenizer_of(Base("llama", tmp_path))
    assert words.pad_token == words.eos_token == "</s>"
    task, net = causal_lm(), plain("llama")
    losses: list[Tensor] = []
    for own in (words, tokenizer()):
        rows = task.encode(own, RECORDS[:4], ()).examples
        losses.append(torch.stack(task.loss(net, task.collate([rows[:1], rows[1:]], own.pad_token_id))))
    assert torch.allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("trap", [False, True])
def test_a_model_learns_to_stop_where_the_end_is_the_padding(trap: bool) -> None:
    """Trained on one-letter answers, it writes the letter and stops. The control masks every pad id in the labels, as
    collators do that find padding by its id: the end is never learned, and the model writes on.
    """
    words = without_pad()
    words.pad_token = words.eos_token
    task = causal_lm(template="plain")
    records = [{"prompt": f"{letter} then", "completion": letter.upper()} for letter in "abcdef"]
    rows = task.encode(words, records, ()).examples
    if trap:
        rows = [{**row, "labels": row["labels"].where(row["ids"] != words.pad_token_id, IGNORE)} for row in rows]
    loaded = equip(copy.deepcopy(plain("llama")), words, build(parse("adapter", "full"), "adapter"), task, 7)
    recipe = replace(RECIPE, optimizer="adamw", lr=0.01, batch=6, epochs=60, clip=1.0)
    cohort = Cohort(loaded, task, recipe, 7, "single", loaded.lift)
    start = trees.expand({name: p.detach() for name, p in loaded.initial.items()}, 1)
    out = trees.pick(cohort.train(1, {"a": rows}, start, {}, None).params, 0)
    with loaded.holding(out) as net:
        texts = generate(Probe(net, words, 6, 12, None), rows)
    assert [text[:1] for text in texts] == list("ABCDEF")
    assert all(len(text) > 3 for text in texts) if trap else texts == list("ABCDEF")
