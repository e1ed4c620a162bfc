"""Rounds of training: a block of clients equals its clients one by one, for every adapter, step after step."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from weft.core import trees
from weft.core.task import Example, Task
from weft.core.types import Tensors
from weft.plugins import build, parse
from weft.site import selfcheck
from weft.site.cohort import Cohort, Mode
from weft.site.model import Loaded, equip
from weft.tasks.causal_lm import causal_lm
from weft.tasks.classification import classification
from weft.testing.families import CLASSES, RECIPE, double, equipped, tiny
from weft.testing.tiny import RECORDS, tokenizer

ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("ia3", {}),
    ("bottleneck", {"size": 4}),
    ("prompt", {"tokens": 3}),
    ("ptuning", {"tokens": 3, "hidden": 8, "encoder": "lstm"}),
    ("prefix", {"tokens": 3, "projection": True}),
    ("lora", {"rank": 2, "dora": True}),
    ("lora", {"rank": 2, "init": "pissa"}),
    ("full", {}),
    ("bitfit", {}),
]
PLACES = [("causal_lm", "llama"), ("causal_lm", "gpt2"), ("classification", "bert")]


def prepared(adapter: str, keys: dict[str, Any], task: str, family: str) -> tuple[Cohort, dict[str, Sequence[Example]]]:
    """Return an engine and three clients with 4, 3 and 2 examples of unlike lengths."""
    made = (causal_lm if task == "causal_lm" else classification)(max_length=48)
    loaded = double(equipped(build(parse("adapter", {adapter: keys}), "adapter"), made, family))
    rows = made.encode(loaded.tokenizer, RECORDS[:9], CLASSES if task == "classification" else ()).examples
    recipe = replace(RECIPE, optimizer="adamw", lr=1e-3, clip=0.05)
    return Cohort(loaded, made, recipe, 3, "padded", loaded.lift), {
        "a": rows[:4], "b": rows[4:7], "c": rows[7:9]
    }  # fmt: skip


def trained(cohort: Cohort, data: dict[str, Sequence[Example]], block: int) -> dict[str, Tensors]:
    """Train in blocks, each client from a start of its own."""
    result, names = {}, list(data)
    draw = torch.Generator().manual_seed(1)
    starts = {
        client: {n: p.detach().cpu() + 0.02 * torch.randn(p.shape, generator=draw) for n, p in _initial(cohort).items()}
        for client in names
    }
    for at in range(0, len(names), block):
        part = names[at : at + block]
        start = trees.stack(starts[client] for client in part)
        out = cohort.train(1, {name: data[name] for name in part}, start, {}, None)
        result.update({name: trees.pick(out.params, k) for k, name in enumerate(part)})
    return result


def _initial(cohort: Cohort) -> Tensors:
    return cohort.loaded.initial


def apart(left: dict[str, Tensors], right: dict[str, Tensors]) -> float:
    return max(float((left[c][n] - right[c][n]).abs().max()) for c in left for n in left[c])


@pytest.mark.parametrize(("task", "family"), PLACES)
@pytest.mark.parametrize(("adapter", "keys"), ADAPTERS)
def test_a_block_equals_its_clients_one_by_one(adapter: str, keys: dict[str, Any], task: str, family: str) -> None:
    """Steps 2, 2 and 1, a short last batch, clipping that bites, AdamW; clients end a thousand times further apart."""
    if adapter == "bitfit" and family == "llama":
        family = "qwen2"
    cohort, data = prepared(adapter, keys, task, family)
    alone = trained(replace(cohort, mode="single"), data, 1)
    assert apart(alone, trained(cohort, data, 3)) < 1e-7
    assert apart(alone, trained(cohort, data, 2)) < 1e-7
    assert apart({"a": alone["a"]}, {"a": alone["b"]}) > 1e-4


@pytest.mark.parametrize(("adapter", "keys"), [row for row in ADAPTERS if row[0] != "bitfit"])
@pytest.mark.parametrize("task", [causal_lm(max_length=48), classification()], ids=["causal_lm", "classification"])
def test_a_base_in_half_precision(adapter: str, keys: dict[str, Any], task: Task) -> None:
    """Trained tensors, a classifier's head among them, are float32 and read what the base gives them in bfloat16."""
    made: Any = copy.deepcopy(tiny("llama", task.auto)).to(torch.bfloat16)  # type: ignore[union-attr]
    loaded = equip(made, tokenizer(), build(parse("adapter", {adapter: keys}), "adapter"), task, 7)
    assert {p.dtype for p in loaded.initial.values()} == {torch.float32}
    cohort = Cohort(loaded, task, RECIPE, 0, "padded", loaded.lift)
    classes = CLASSES if task.peft_type == "SEQ_CLS" else ()
    rows = selfcheck._ragged(cohort, task.encode(loaded.tokenizer, RECORDS[:8], classes).examples)
    alone, together = (selfcheck._gradients(cohort, rows, together=both) for both in (False, True))
    assert float((alone - together).abs().max()) < 0.05 * float(alone.abs().max())


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("adapter", ["ia3", "bottleneck", "full"])
def test_checkpointing_changes_nothing(adapter: str, mode: Mode) -> None:
    results = []
    for checkpointing in (False, True):
        cohort, data = prepared(adapter, {}, "causal_lm", "llama")
        if checkpointing:
            cohort.loaded = _saving(cohort.loaded, adapter)
            cohort.lift = cohort.loaded.lift
        results.append(trained(replace(cohort, mode=mode), data, 3))
    assert apart(*results) < 1e-9


def _saving(loaded: Loaded, adapter: str) -> Loaded:
    made: Any = copy.deepcopy(tiny("llama", "AutoModelForCausalLM"))
    return double(
        equip(made, tokenizer(), build(parse("adapter", adapter), "adapter"), causal_lm(), 7, checkpointing=True)
    )
