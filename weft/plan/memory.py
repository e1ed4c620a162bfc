"""The memory of one training client, from the config alone: the engine's own step, run on tensors without values.

Nothing is guessed by family: a step of `weft.site.cohort` runs under torch's FakeTensorMode, which knows every shape
and holds no number, and the most bytes that lived at once are counted. Layers that are alike cost alike, so models of a
few layers are run and the rest is a straight line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from weft.core.errors import JobError
from weft.core.task import Example, Task
from weft.core.types import Adapter
from weft.plan.counts import put_on
from weft.plan.live import Live
from weft.plan.skeleton import layers_of, on_meta, with_layers
from weft.site import packing
from weft.site.cohort import Cohort, Lane, Layout, Progress
from weft.site.model import ready
from weft.site.recipe import Recipe

FEW = (2, 4)
"""Layers of the models that are run in place of a deeper one."""
KEPT = 0.35
"""What glibc's allocator keeps of freed activations, as a share of those that live: measured, benchmarks/plan.py."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a client needs to train, by what holds them."""

    base: int
    adapter: int
    """The adapter as it was received, as it is trained, and its gradient."""
    optimizer: int
    activations: int
    """All else that lives at the fullest moment, a piece of the scores over the vocabulary among it."""
    allocator: int
    """What the allocator keeps beside what lives."""

    @property
    def total(self) -> int:
        """Return the bytes at the fullest moment."""
        return self.base + self.adapter + self.optimizer + self.activations + self.allocator


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
    in_all: int


def memory(config: Any, shape: Shape) -> Memory:
    """Return the memory of one client's training step; raise JobError where the adapter does not fit the model."""
    seen = _deep(config, shape)
    adapter, most = 3 * 4 * seen.trained, max(seen.in_pass, seen.in_all)
    rest = max(0, most - seen.base - adapter - seen.moments)
    passing = max(0, seen.in_pass - seen.base - adapter - seen.moments)
    return Memory(seen.base, adapter, seen.moments, rest, round(KEPT * passing))


def _deep(config: Any, shape: Shape) -> _Seen:
    """Return what a model of the whole depth holds, by a straight line where its layers allow it."""
    layers = layers_of(config)
    if layers <= FEW[-1]:
        return _run(config, shape)
    try:
        low, high = (_run(with_layers(config, few), shape) for few in FEW)
    except JobError:  # an adapter of certain layers, which those of a few do not have
        return _run(config, shape)
    if (
        high.in_all > 1.02 * high.in_pass
    ):  # the optimizer's step is the fullest moment, which may be otherwise in a deeper one
        return _run(config, shape)
    along = (layers - FEW[0]) / (FEW[1] - FEW[0])
    names = ("base", "trained", "moments", "in_pass", "in_all")
    return _Seen(**{n: round(getattr(low, n) + along * (getattr(high, n) - getattr(low, n))) for n in names})


def _run(config: Any, shape: Shape) -> _Seen:
    """Take one step without values; return the most bytes in the pass and in the optimizer's step."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    task = shape.task
    net = put_on(on_meta(config, task, shape.classes, shape.dtype), shape.adapter, task)
    packs = task.pack is not None and packing.supported(net)
    _without_values(net, mode)
    rows = [_referred(task, net, shape.examples)]
    batch = task.pack(rows) if task.pack and packs else task.collate(rows, 0)
    made = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    given = replace(task, pack=lambda rows: made, collate=lambda rows, pad: made)  # made of values, which go no further
    with mode:
        words = SimpleNamespace(pad_token_id=0)
        loaded = ready(net, words, torch.device("cpu"), checkpointing=shape.recipe.checkpointing)
        loaded.below = replace(loaded.below, layers=())  # words without values are not told apart
        engine = Cohort(loaded, given, shape.recipe, 0, "packed" if packs else "single", loaded.lift)
        return _step(engine, Live(), shape)


def _referred(task: Task, net: nn.Module, examples: Sequence[Example]) -> Sequence[Example]:
    """Return examples with what the loss asks of the base, zeros for its numbers."""
    if task.refer is None:
        return examples
    asked = task.refer(net, examples, 0, len(examples))  # outside the mode: indices of labels need values
    return [
        {key: torch.zeros(value.shape) if isinstance(value, FakeTensor) else value for key, value in row.items()}
        for row in asked
    ]


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
    """Take the first step of a round, beside the adapter that was received."""
    net = engine.loaded.net
    initial = {name: p.detach() for name, p in engine.loaded.initial.items()}
    for tensor in [*net.parameters(), *net.buffers()]:
        live.count(tensor)
    base, trained = live.now, sum(p.numel() for p in initial.values())
    net.train()
    with live:
        start = {name: p[None].clone() for name, p in initial.items()}
        layout = Layout({name: tuple(p.shape) for name, p in initial.items()})
        params = layout.flat(start).requires_grad_()
        moments = engine.optimizer.start(params)
        held = sum(value.untyped_storage().nbytes() for value in moments.values())
        passed: list[int] = []
        params.register_post_accumulate_grad_hook(lambda grown: passed.append(live.most))
        lane = Lane(0, "client", shape.examples, [list(range(len(shape.examples)))])
        live.restart()
        engine._step(Progress([lane], params, moments), layout, 1, None)
    return _Seen(base, trained, held, passed[-1], live.most)
