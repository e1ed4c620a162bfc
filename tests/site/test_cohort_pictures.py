"""Blocks of clients with pictures: equal to one by one in float64, and the controls that must differ."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from weft.core import trees
from weft.core.task import Example, Task
from weft.core.types import Tensors
from weft.plugins import build, parse
from weft.site import lift
from weft.site.cohort import Cohort
from weft.tasks.image_classification import image_classification
from weft.tasks.image_text import image_text
from weft.testing.families import CLASSES, RECIPE, double, equipped
from weft.testing.tiny import RECORDS

ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 2, "dropout": 0.2}),
    ("lora", {"rank": 2, "dora": True}),
    ("ia3", {}),
    ("bottleneck", {"size": 4}),
    ("bitfit", {}),
    ("full", {}),
]
TASKS: dict[str, Task] = {"vit": image_classification(), "clip": image_text(max_length=48)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a name that transformers renames
        yield


def prepared(family: str, adapter: str, keys: dict[str, Any]) -> tuple[Cohort, dict[str, Sequence[Example]]]:
    """Return an engine and three clients with 5, 4 and 2 examples: 2, 2 and 1 steps of 3, a short last batch."""
    task = TASKS[family]
    loaded = double(equipped(build(parse("adapter", {adapter: keys}), "adapter"), task, family))
    rows = task.encode(loaded.tokenizer, RECORDS[:11], CLASSES if family == "vit" else ()).examples
    for row in rows:
        row["pixels"] = row["pixels"].double()
    recipe = replace(RECIPE, optimizer="adamw", lr=1e-3, clip=0.05, batch=3)
    return Cohort(loaded, task, recipe, 3, "padded", loaded.lift), {"a": rows[:5], "b": rows[5:9], "c": rows[9:]}


def trained(cohort: Cohort, data: dict[str, Sequence[Example]], block: int) -> dict[str, Tensors]:
    """Train in blocks, each client from a start of its own."""
    result, names = {}, list(data)
    draw = torch.Generator().manual_seed(1)
    starts = {
        client: {n: p.detach() + 0.02 * torch.randn(p.shape, generator=draw) for n, p in cohort.loaded.initial.items()}
        for client in names
    }
    for at in range(0, len(names), block):
        part = names[at : at + block]
        start = trees.stack(starts[client] for client in part)
        out = cohort.train(1, {name: data[name] for name in part}, start, {}, None)
        result.update({name: trees.pick(out.params, k) for k, name in enumerate(part)})
    return result


def apart(left: dict[str, Tensors], right: dict[str, Tensors]) -> float:
    return max(float((left[c][n] - right[c][n]).abs().max()) for c in left for n in left[c])


@pytest.mark.parametrize("family", list(TASKS))
@pytest.mark.parametrize(("adapter", "keys"), ADAPTERS)
def test_a_block_equals_its_clients_one_by_one(family: str, adapter: str, keys: dict[str, Any]) -> None:
    """AdamW, clipping that bites, dropout over patches and tokens; clients end far further apart than 1e-7."""
    if (family, adapter) == ("clip", "full"):
        pytest.skip("its text tower asks a trained table for its length: trained one by one, with a notice")
    cohort, data = prepared(family, adapter, keys)
    alone = trained(replace(cohort, mode="single"), data, 1)
    assert apart(alone, trained(cohort, data, 3)) < 1e-7
    assert apart(alone, trained(cohort, data, 2)) < 1e-7
    assert apart({"a": alone["a"]}, {"a": alone["b"]}) > 1e-4


def test_negatives_of_other_clients_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one InfoNCE over the whole block, its rows divided by client afterwards."""
    cohort, data = prepared("clip", "lora", {"rank": 2})
    right = trained(cohort, data, 3)
    task = cohort.task

    def mixed(net: Any, batch: Any) -> Any:
        counts = batch["counts"]
        total, _ = task.loss(net, {**batch, "counts": [len(batch["input_ids"])]})
        return total.expand(len(counts)) * torch.tensor(counts) / sum(counts), torch.tensor(counts)

    assert apart(right, trained(replace(cohort, task=replace(task, loss=mixed)), data, 3)) > 1e-5


def masked_places(family: str, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return how many places of a row dropout draws for in the picture tower: 4 patches and the class token are 5."""
    seen, right = set(), lift._mask

    def watched(piece: torch.Tensor, p: float, seed: int, own: tuple[int, int] | None) -> torch.Tensor:
        if own and piece.dim() == 3 and piece.shape[1] == 5:
            seen.add(own[1])
        return right(piece, p, seed, own)

    cohort, data = prepared(family, "lora", {"rank": 2, "dropout": 0.2})
    with monkeypatch.context() as patch:
        patch.setattr(lift, "_mask", watched)
        trained(cohort, data, 3)
    return seen


@pytest.mark.parametrize("family", list(TASKS))
def test_dropout_is_drawn_for_every_patch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: masks of the picture tower drawn over the length of a caption, or of no text at all."""
    assert masked_places(family, monkeypatch) == {5}
    monkeypatch.setattr(lift, "_pictured", lambda net: set())
    assert 5 not in masked_places(family, monkeypatch)


def test_embeddings_that_read_trained_tensors_are_lifted_whole() -> None:
    """ViT's class token and positions are parameters of a module that calls a lifted convolution."""
    cohort, _ = prepared("vit", "full", {})
    kinds = [type(module).__name__ for module in cohort.lift.forwards]
    assert kinds.count("ViTEmbeddings") == 1
    assert "Conv2d" not in kinds
    assert not cohort.lift.looped
