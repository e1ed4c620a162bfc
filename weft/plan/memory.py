"""The memory of one training client, from the config alone: the engine's own step, run on tensors without values.

Nothing is guessed by family: a step of `weft.site.cohort` runs under torch's FakeTensorMode, which knows every shape
and holds no number, and the most bytes that lived at once are counted. Layers that are alike cost alike, so models of a
few layers are run and the rest is a straight line, for the pass and for the optimizer step apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from weft.core.types import Adapter, Example, Task
from weft.plan.counts import put_on
from weft.plan.live import Live
from weft.plan.skeleton import layers_of, on_meta, with_layers
from weft.site import packing
from weft.site.cohort import Cohort, Lane, Layout, Progress, Recipe
from weft.site.model import ready

FEW = (3, 6)
"""Layers of the models that are run in place of a deeper one."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a client needs to train, by what holds them."""

    base: int
    adapter: int
    """Trained numbers and their gradients, as the engine holds them."""
    optimizer: int
    logits: int
    """The scores over the vocabulary with their gradient."""
    activations: int
    """All else that lives at the fullest moment."""

    @property
    def total(self) -> int:
        """Return the bytes at the fullest moment."""
        return self.base + self.adapter + self.optimizer + self.logits + self.activations


@dataclass(frozen=True)
class Shape:
    """What decides the memory of a step, beside the model."""

    adapter: Adapter
    task: Task
    recipe: Recipe
    dtype: str
    classes: int
    examples: Sequence[Example]
    """One micro-batch."""


@dataclass(frozen=True)
class _Seen:
    base: int
    trained: int
    moments: int
    in_pass: int
    in_step: int


def memory(config: Any, shape: Shape) -> Memory:
    """Return the memory of one client's training step; raise JobError where the adapter does not fit the model."""
    layers = layers_of(config)
    if layers <= FEW[-1]:
        seen = _run(config, shape)
    else:
        low, high = (_run(with_layers(config, few), shape) for few in FEW)
        along = (layers - FEW[0]) / (FEW[1] - FEW[0])
        names = ("base", "trained", "moments", "in_pass", "in_step")
        seen = _Seen(**{n: round(getattr(low, n) + along * (getattr(high, n) - getattr(low, n))) for n in names})
    adapter = 2 * 4 * seen.trained
    logits = _logits(config, shape)
    most = max(seen.in_pass, seen.in_step)
    rest = most - seen.base - adapter - seen.moments
    return Memory(seen.base, adapter, seen.moments, min(logits, max(0, rest)), max(0, rest - logits))


def _logits(config: Any, shape: Shape) -> int:
    """Return the bytes of the scores of the labelled positions, float32, and of their gradient."""
    if shape.classes:
        return 2 * 4 * len(shape.examples) * shape.classes
    labelled = sum(int((row["labels"][1:] != -100).sum()) for row in shape.examples)
    return 2 * 4 * labelled * int(config.get_text_config().vocab_size)


def _run(config: Any, shape: Shape) -> _Seen:
    """Take one step without values; return the most bytes in the pass and in the optimizer's step."""
    rows = [shape.examples]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    task = shape.task
    net = put_on(on_meta(config, task, shape.classes, shape.dtype), shape.adapter, task)
    packs = task.pack is not None and packing.supported(net)
    batch = task.pack(rows) if task.pack and packs else task.collate(rows, 0)
    made = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    given = replace(task, pack=lambda rows: made, collate=lambda rows, pad: made)  # made of values, which go no further
    _without_values(net, mode)
    with mode:
        words = SimpleNamespace(pad_token_id=0)
        loaded = ready(net, words, torch.device("cpu"), checkpointing=shape.recipe.checkpointing)
        engine = Cohort(loaded, given, shape.recipe, 0, "packed" if packs else "single", loaded.lift)
        return _step(engine, Live(), shape)


def _without_values(net: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors that know their shape, and a processor to be on, in place of those on the meta device."""
    made: dict[int, Any] = {}
    for module in net.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    wide = tensor.float() if tensor.requires_grad else tensor
                    fake = FakeTensor(mode, wide.detach().to("meta"), torch.device("cpu"))
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if held is module._parameters else fake
                if tensor is not None:
                    held[name] = made[id(tensor)]


def _step(engine: Cohort, live: Live, shape: Shape) -> _Seen:
    frozen = [p for p in engine.loaded.net.parameters() if not p.requires_grad]
    initial = {name: p.detach() for name, p in engine.loaded.initial.items()}
    for tensor in [*frozen, *engine.loaded.net.buffers(), *initial.values()]:
        live.count(tensor)
    base, trained = live.now, sum(p.numel() for p in initial.values())
    with live:
        layout = Layout({name: tuple(p.shape) for name, p in initial.items()})
        params = layout.flat({name: p[None] for name, p in initial.items()}).requires_grad_()
        moments = engine.optimizer.start(params)
        held = sum(value.untyped_storage().nbytes() for value in moments.values())
        lane = Lane(0, "client", shape.examples, [list(range(len(shape.examples)))])
        progress = Progress([lane], params, moments)
        engine.loaded.net.train()
        live.restart()
        engine.losses(layout.named(params), [shape.examples], [0])
        in_pass = live.most
        params.grad = None
        live.restart()
        step = _optimizer_step(engine, progress, layout)
        in_step = max(live.most, step)
    return _Seen(base, trained, held, in_pass, in_step)


def _optimizer_step(engine: Cohort, progress: Progress, layout: Layout) -> int:
    """Clip and step with a gradient that is there already."""
    grads = progress.params.detach().clone()
    if engine.recipe.clip is not None:
        grads = grads * (engine.recipe.clip / (grads.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
    engine.optimizer.step(progress.params.detach(), grads, progress.moments, torch.ones(1, 1))
    return 0
