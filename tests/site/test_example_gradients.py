"""Each example's own gradient out of a block, against plain autograd on the plain model, one example at a time."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.site.private_clients import cohort, examples, start
from weft.core.task import Example
from weft.site.cohort import Cohort, Layout
from weft.site.dpsgd import Slot

METHODS = ["lora", "ia3", "bottleneck", "prompt", "prefix", "bitfit", "full", "ptuning"]


def apart(engine: Cohort, rows: list[Example]) -> torch.Tensor:
    """Return the engine's gradient of each example, (examples, numbers)."""
    params = start(engine)
    layout = Layout({name: tuple(params[name].shape[1:]) for name in sorted(params)})
    slots = [Slot(0, i, row, i) for i, row in enumerate(rows)]
    grads, _ = engine._apart(layout.flat(params), slots, layout)
    return grads


def one_by_one(engine: Cohort, rows: list[Example]) -> torch.Tensor:
    """Return the same by a loop of our own: the plain model, cross entropy by hand, torch.autograd.grad."""
    net, named = engine.loaded.net, dict(engine.loaded.net.named_parameters())
    with torch.no_grad():
        for name, value in start(engine).items():
            named[name].copy_(value[0])
    result = []
    for row in rows:
        ids = row["ids"][None]
        out = net(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if "label" in row:
            loss = functional.cross_entropy(out, torch.tensor([row["label"]]))
        else:
            loss = functional.cross_entropy(out[0, -len(row["ids"]) : -1], row["labels"][1:])
        grads = torch.autograd.grad(loss, [named[name] for name in sorted(start(engine))])
        result.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(result)


def worst(engine: Cohort, rows: list[Example]) -> float:
    """Return the largest difference of a number, over the largest number."""
    ours, theirs = apart(engine, rows), one_by_one(engine, rows)
    assert float(theirs.norm(dim=1).min()) > 1e-4
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("adapter", METHODS)
def test_language_models(adapter: str) -> None:
    """Six texts of unlike lengths together; the tiny model rounds its norms to float32, hence 1e-6."""
    engine = cohort(adapter)
    assert worst(engine, examples(engine, 6)) < 1e-6


@pytest.mark.parametrize("adapter", METHODS)
def test_classifiers_heads_included(adapter: str) -> None:
    engine = cohort(adapter, "classification")
    assert worst(engine, examples(engine, 6)) < 1e-6


@pytest.mark.parametrize("adapter", ["lora", "ia3", "bottleneck", "bitfit", "full"])
def test_packed_blocks(adapter: str) -> None:
    engine = cohort(adapter, mode="packed")
    assert worst(engine, examples(engine, 6)) < 1e-6


def test_dora_takes_the_tier_of_single_layers() -> None:
    engine = cohort("lora", dora=True)
    assert worst(engine, examples(engine, 4)) < 1e-6


def test_a_mean_over_the_batch_would_differ() -> None:
    """Negative control: the gradient of the batch's token mean is no mean of the examples' gradients."""
    engine = cohort()
    rows = examples(engine, 4)
    params = start(engine)
    layout = Layout({name: tuple(params[name].shape[1:]) for name in sorted(params)})
    whole = layout.flat(params).requires_grad_()
    _, count = engine.losses(layout.named(whole), [rows], [0])
    assert whole.grad is not None
    mean = apart(engine, rows).mean(0)
    assert float((whole.grad[0] / count - mean).abs().max()) > 1e-3 * float(mean.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("adapter", "task"), [("lora", "causal_lm"), ("lora", "classification"), ("bitfit", "causal_lm")]
)
def test_opacus_gives_the_same(adapter: str, task: str) -> None:
    """Hooks of another library, where they are right; for prompts they count a whole batch as one example."""
    opacus = pytest.importorskip("opacus")
    engine = cohort(adapter, task)
    rows: list[Example] = examples(engine, 4)
    ours, theirs = apart(engine, rows), by_opacus(opacus, engine, rows)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-6


def by_opacus(opacus: Any, engine: Cohort, rows: list[Example]) -> torch.Tensor:
    net, named = engine.loaded.net, dict(engine.loaded.net.named_parameters())
    with torch.no_grad():
        for name, value in start(engine).items():
            named[name].copy_(value[0])
    hooked = opacus.GradSampleModule(net.train(), strict=False)
    longest = max(len(row["ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["ids"])], mask[i, : len(row["ids"])] = row["ids"], 1
    out = hooked(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if "label" in rows[0]:
        losses = functional.cross_entropy(out, torch.tensor([row["label"] for row in rows]), reduction="none")
    else:
        each = [functional.cross_entropy(out[i, : len(r["ids"]) - 1], r["labels"][1:]) for i, r in enumerate(rows)]
        losses = torch.stack(each)
    losses.mean().backward()
    grads = [named[name].grad_sample.flatten(1) for name in sorted(start(engine))]
    net.eval()
    return torch.cat(grads, 1)
