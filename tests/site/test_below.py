"""Frozen layers below the adapter: computed once an example, and every client ends with the very bits."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from weft import Job
from weft.adapters.lora import lora
from weft.core import trees
from weft.core.task import Task
from weft.core.types import Tensors
from weft.prepare import prepare
from weft.site.below import LEAST, Kept, layers_below
from weft.site.cohort import Cohort
from weft.site.model import Loaded
from weft.site.twins import twin
from weft.tasks.causal_lm import causal_lm
from weft.tasks.classification import classification
from weft.tasks.preference import preference
from weft.testing.families import CLASSES, RECIPE, equipped
from weft.testing.tiny import RECORDS

UPPER = {
    "llama": "layers.1.self_attn.q_proj",
    "qwen2": "layers.1.self_attn.v_proj",
    "qwen3": "layers.1.mlp.up_proj",
    "phi3": "layers.1.self_attn.qkv_proj",
    "glm": "layers.1.self_attn.q_proj",
    "opt": "layers.1.self_attn.q_proj",
    "gpt2": "h.1.attn.c_attn",
    "bert": "layer.1.attention.self.query",
}
"""Family -> a target in the second of its two layers."""


def still(net: nn.Module) -> nn.Module:
    """Switch dropout off."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def model(task: Task, family: str = "llama", *, plain: bool = False) -> Loaded:
    """Return a tiny model with an adapter in its second layer; plain: one that computes all layers at every step."""
    loaded = equipped(lora(rank=2, targets=[UPPER[family]]), task, family)
    layers = [] if plain else layers_below(still(loaded.net))
    return replace(loaded, below=replace(loaded.below, layers=layers))


def trained(loaded: Loaded, task: Task, first: int = 0, **changes: Any) -> tuple[Tensors, int]:
    """Return what two clients end with, and how many tokens went through the lowest layer."""
    classes = CLASSES if "Classification" in task.auto else ()
    rows = loaded.referred(task, task.encode(loaded.tokenizer, RECORDS[first : first + 10], classes).examples, 4)
    data = {"one": rows[:4], "two": rows[4:]}
    recipe = replace(RECIPE, **{"optimizer": "adamw", "lr": 0.01, "epochs": 3, "clip": 0.1, **changes})
    tokens: list[int] = []
    stack: Any = next(module for module in loaded.net.modules() if isinstance(module, nn.ModuleList))
    norm = next(module for module in stack[0].modules() if type(module).__name__.endswith("Norm"))
    hook = norm.register_forward_hook(lambda module, args, out: tokens.append(out.numel() // out.shape[-1]))
    start = trees.expand({name: p.detach() + 0.02 for name, p in loaded.initial.items()}, 2)
    found = Cohort(loaded, task, recipe, 3, "packed", loaded.lift).train(1, data, start, {}, None)
    hook.remove()
    return found.params, sum(tokens)


def same(left: Tensors, right: Tensors) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def alike(left: Tensors, right: Tensors) -> bool:
    return all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6) for name in left)


@pytest.mark.parametrize("family", UPPER)
def test_each_example_goes_through_the_lower_layers_once(family: str) -> None:
    """In three epochs and a round more; the control takes it through them in each."""
    task = classification() if family == "bert" else causal_lm()
    loaded, plain = model(task, family), model(task, family, plain=True)
    assert len(loaded.below.layers) == 1
    expected, often = trained(plain, task)
    kept, few = trained(loaded, task)
    again, none = trained(loaded, task)
    assert alike(kept, expected)
    assert same(again, kept)
    assert 0 < few <= often / 3
    assert none == 0


@pytest.mark.parametrize(
    ("changes", "repeated"),
    [
        ({}, True),
        ({"epochs": 2}, False),
        ({"everyone": False}, False),
        ({"epochs": 1, "rounds": 3}, True),
        ({"steps": 2}, False),  # which may be less than an epoch
        ({"steps": 2, "rounds": 3}, True),
    ],
)
def test_only_where_the_data_is_passed_over_more_than_twice(changes: dict[str, Any], repeated: bool) -> None:
    task = causal_lm()
    loaded = model(task)
    trained(loaded, task, **changes)
    assert bool(loaded.below.kept.states) == repeated


def test_a_job_says_whether_all_clients_train_in_each_round(job: Job) -> None:
    sampled = job.model_copy(update={"clients": job.clients.model_copy(update={"per_round": 2})})
    assert [prepare(one).plan.recipe.everyone for one in (job, sampled)] == [True, False]


def test_a_pair_is_two_rows() -> None:
    task = preference()
    loaded, plain = model(task), model(task, plain=True)
    kept, few = trained(loaded, task)
    expected, often = trained(plain, task)
    assert alike(kept, expected)
    assert 0 < few <= often / 3


def test_a_head_that_is_trained_stands_above_all_layers() -> None:
    task = classification()
    loaded, plain = model(task), model(task, plain=True)
    assert any("score" in name for name in loaded.places)
    assert len(loaded.below.layers) == 1
    assert alike(trained(loaded, task)[0], trained(plain, task)[0])


def test_the_bits_do_not_depend_on_what_was_kept() -> None:
    """A run that stopped goes on with nothing kept, others with what other clients left: the bits are the same."""
    task = causal_lm()
    fresh, warm, none, some = (model(task) for _ in range(4))
    trained(warm, task, first=4)
    none.below.kept.let_go()
    some.below.kept.most = 9000  # bytes; a token takes 64 here
    expected, _ = trained(fresh, task)
    for loaded in (warm, none, some):
        assert same(trained(loaded, task)[0], expected)
    assert none.below.kept.states == {}
    assert 0 < len(some.below.kept.states) < len(fresh.below.kept.states)


def test_no_more_is_kept_than_is_said() -> None:
    task = causal_lm()
    loaded = model(task)
    kept = loaded.below.kept
    assert kept.most == LEAST == Kept(1).most
    assert Kept(2 * LEAST).most == 2 * LEAST
    trained(loaded, task)
    assert kept.bytes == sum(value.untyped_storage().nbytes() for value in kept.states.values()) > 0


def test_threads_share_what_is_kept() -> None:
    task = causal_lm()
    loaded = model(task)
    other = twin(loaded)
    assert other.below.kept is loaded.below.kept
    assert not {*other.below.layers} & {*loaded.below.layers}
    ends: list[tuple[Tensors, int]] = []
    threads = [threading.Thread(target=lambda net=net: ends.append(trained(net, task))) for net in (loaded, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected, _ = trained(model(task), task)
    assert [same(params, expected) for params, _ in ends] == [True, True]


def test_memory_that_runs_out_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    task, real, calls = causal_lm(), Cohort.losses, list[int]()
    loaded = model(task)
    expected, _ = trained(loaded, task)

    def failing(self: Cohort, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("planted")
        return real(self, *given)

    monkeypatch.setattr(Cohort, "losses", failing)
    assert alike(trained(loaded, task)[0], expected)
    assert (loaded.below.kept.states, loaded.below.kept.most) == ({}, 0)


def below(net: nn.Module) -> int:
    return len(layers_below(net))


class Small(nn.Module):
    """An embedding, four layers, a norm, a head and a second list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.score = nn.Embedding(4, 2), nn.LayerNorm(2), nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)) for _ in range(4))
        self.other = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (["layers.2"], 2),
        (["layers.3", "layers.1.0"], 1),
        (["layers.2", "score"], 2),
        (["layers.0", "layers.3"], 0),
        (["layers.2", "embed"], 0),
        (["layers.2", "norm"], 0),  # where it stands is not known
        (["layers.2", "other.3"], 0),
        (["score"], 0),
    ],
)
def test_which_layers_are_below(trained: list[str], expected: int) -> None:
    net = Small()
    for path in trained:
        net.get_submodule(path).requires_grad_()
    assert below(net) == expected


def test_layers_that_draw_masks_or_are_computed_again_are_not_skipped() -> None:
    net = Small()
    net.layers[2].requires_grad_()
    net.layers[3][1].p = 0.5  # type: ignore[index, union-attr]  # above
    assert below(net) == 2
    net.layers[1][1].p = 0.5  # type: ignore[index, union-attr]
    assert below(net) == 0
    net.layers[1][1].p = 0.0  # type: ignore[index, union-attr]
    net.layers[3].gradient_checkpointing = True
    assert below(net) == 0
    net.layers[3].gradient_checkpointing = False
    assert below(net) == 2
    net.layerdrop = 0.1
    assert below(net) == 0
