"""Train a block of clients over the one frozen base: one forward and one backward pass for all of them.

Each client keeps its own batches, loss, gradient clipping, learning rate, optimizer state and number of steps; the
result is that of training them one by one. Clients that are done leave the block: their rows are cut off.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import ceil, cos, pi
from typing import Literal

import torch
from torch import Tensor

from weft.core import keys
from weft.core.errors import RunError
from weft.core.trees import on_device
from weft.core.types import Batch, Example, Gradient, State, Task, Tensors
from weft.site import packing
from weft.site.lanes import Lanes
from weft.site.lift import Lift
from weft.site.model import Loaded
from weft.site.optimizers import Moments, Optimizer

FLOAT16_SCALE = 1024.0  # keeps float16 gradients of a frozen float16 base above underflow
Mode = Literal["packed", "padded", "single"]


@dataclass(frozen=True)
class Recipe:
    """How a client trains: the job's `local` section, with the number of rounds that the schedule spans."""

    optimizer: Literal["adamw", "sgd"]
    lr: float
    batch: int
    accumulate: int
    epochs: int
    steps: int | None
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    clip: float | None
    weight_decay: float
    momentum: float
    moments: Literal["reset", "keep"]
    checkpointing: bool
    rounds: int

    def steps_of(self, examples: int) -> int:
        """Return the optimizer steps of a round for a client with this many examples."""
        return self.steps or self.epochs * ceil(examples / (self.batch * self.accumulate))

    def rate(self, done: float) -> float:
        """Return the learning rate after this part, 0 to 1, of the whole run."""
        if done < self.warmup:
            return self.lr * done / self.warmup
        left = 1 - (done - self.warmup) / (1 - self.warmup)
        shape = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - cos(pi * left))}
        return self.lr * shape[self.schedule]


def batches(examples: int, recipe: Recipe, seed: int, round_: int, client: str) -> list[list[int]]:
    """Return the example numbers of each optimizer step, shuffled anew in every epoch."""
    size, wanted = recipe.batch * recipe.accumulate, recipe.steps_of(examples)
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < wanted:
        order = keys.permutation(examples, seed, round_, client, "batches", epoch)
        steps += [order[i : i + size] for i in range(0, examples, size)]
        epoch += 1
    return steps[:wanted]


@dataclass
class Lane:
    """One client of a block: its data, its batches, and what comes out."""

    row: int
    client: str
    examples: Sequence[Example]
    order: list[list[int]]
    losses: list[Tensor] = field(default_factory=list)
    params: Tensor | None = None
    moments: Moments = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What came out of a block's round, clients in the order in which they were given."""

    params: Tensors
    """(clients, *shape) float32 on the CPU."""
    moments: State
    losses: list[Tensor]
    """A client's mean loss at each step, before the step."""


@dataclass(frozen=True)
class Layout:
    """Named tensors as one row of numbers a client."""

    shapes: dict[str, tuple[int, ...]]

    def flat(self, stack: Tensors) -> Tensor:
        """Return (clients, *shape) tensors as (clients, numbers)."""
        return torch.cat([stack[name].flatten(1) for name in self.shapes], 1)

    def named(self, flat: Tensor) -> Tensors:
        """Return views of (clients, numbers) by name, (clients, *shape); gradients flow back in one piece."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        parts = flat.split(sizes, 1)
        return {n: part.view(len(flat), *shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass
class Progress:
    """The rows of the clients that are still training, longest first."""

    lanes: list[Lane]
    params: Tensor
    moments: Moments
    step: int = 0

    def rows(self, chosen: slice) -> "Progress":
        """Return some of the clients, at the same step."""
        moments = {name: value[chosen].clone() for name, value in self.moments.items()}
        params = self.params.detach()[chosen].clone().requires_grad_()
        return Progress(self.lanes[chosen], params, moments, self.step)

    def retire(self) -> "Progress":
        """Let the clients go that have no step left; return the others."""
        left = sum(len(lane.order) > self.step for lane in self.lanes)
        if left == len(self.lanes):
            return self
        for row, lane in enumerate(self.lanes[left:], left):
            lane.params = self.params.detach()[row].cpu()
            lane.moments = {name: value[row].cpu() for name, value in self.moments.items()}
        return self.rows(slice(0, left))


@dataclass
class Cohort:
    """The engine of a site: one resident model, blocks of clients."""

    loaded: Loaded
    task: Task
    recipe: Recipe
    seed: int
    mode: Mode
    lift: Lift
    notice: Callable[[str], None] = lambda text: None

    @property
    def optimizer(self) -> Optimizer:
        """Return the elementwise optimizer of the recipe."""
        return Optimizer(self.recipe.optimizer, self.recipe.weight_decay, self.recipe.momentum)

    def train(
        self,
        round_: int,
        clients: dict[str, Sequence[Example]],
        start: Tensors,
        moments: State,
        gradient: Gradient | None,
    ) -> Trained:
        """Take all steps of a round from `start`, shapes (clients, *shape)."""
        layout = Layout({name: tuple(start[name].shape[1:]) for name in sorted(start)})
        lanes = [
            Lane(row, name, examples, batches(len(examples), self.recipe, self.seed, round_, name))
            for row, (name, examples) in enumerate(clients.items())
        ]
        longest_first = sorted(range(len(lanes)), key=lambda k: -len(lanes[k].order))
        params = layout.flat(start)[longest_first].to(self.loaded.device).requires_grad_()
        progress = Progress([lanes[k] for k in longest_first], params, self.optimizer.start(params))
        if self.recipe.moments == "keep" and moments:
            for name in progress.moments:
                tree = moments[f"optimizer.{name}"]
                rows = tree["step"] if name == "step" else layout.flat(tree)
                progress.moments[name] = rows[longest_first].to(self.loaded.device)
        self.loaded.net.train()
        try:
            self._run(progress, layout, round_, gradient)
        finally:
            self.loaded.net.eval()
        return _finished(lanes, layout)

    def _run(self, progress: Progress, layout: Layout, round_: int, gradient: Gradient | None) -> None:
        """Step until every client is done; where memory runs out, go on from the same step with half the clients."""
        progress = progress.retire()
        while progress.lanes:
            try:
                self._step(progress, layout, round_, gradient)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                half = len(progress.lanes) // 2
                if not half:
                    raise RunError(
                        f"out of memory with one client and {self.recipe.batch} examples at a time; lower local.batch "
                        "(and raise local.accumulate), lower max_length, or set local.checkpointing"
                    ) from None
                progress.params.grad = None
                halves = progress.rows(slice(0, half)), progress.rows(slice(half, None))
                torch.cuda.empty_cache()
                self.notice(f"out of memory with {len(progress.lanes)} clients in a block; going on with {half}")
                for part in halves:
                    self._run(part, layout, round_, gradient)
                return
            progress.step += 1
            progress = progress.retire()

    def _step(self, progress: Progress, layout: Layout, round_: int, gradient: Gradient | None) -> None:
        """Take one optimizer step of every client in the block."""
        losses = self._backward(progress, layout, round_)
        grads = progress.params.grad
        assert grads is not None
        if gradient:
            rows = torch.tensor([lane.row for lane in progress.lanes], device=grads.device)
            corrected = gradient(layout.named(grads), layout.named(progress.params.detach()), rows)
            grads = layout.flat(corrected)
        if self.recipe.clip is not None:
            norms = grads.norm(dim=1, keepdim=True)
            grads = grads * (self.recipe.clip / (norms + 1e-6)).clamp(max=1.0)
        done = [(round_ - 1 + progress.step / len(lane.order)) / self.recipe.rounds for lane in progress.lanes]
        rate = torch.tensor([[self.recipe.rate(part)] for part in done], dtype=grads.dtype, device=grads.device)
        self.optimizer.step(progress.params.detach(), grads, progress.moments, rate)
        progress.params.grad = None
        for lane, loss in zip(progress.lanes, losses, strict=True):
            lane.losses.append(loss)

    def _backward(self, progress: Progress, layout: Layout, round_: int) -> Tensor:
        """Add up the gradients of one step's micro-batches; return each client's mean loss, (clients,)."""
        scale = FLOAT16_SCALE if next(self.loaded.net.parameters()).dtype == torch.float16 else 1.0
        sums = torch.zeros(len(progress.lanes), device=self.loaded.device, dtype=progress.params.dtype)
        counts = torch.zeros_like(sums)
        progress.params.grad = None
        for part in range(self.recipe.accumulate):
            rows = [self._micro(lane, progress.step, part) for lane in progress.lanes]
            if not any(rows):
                break
            seeds = [
                keys.number(self.seed, round_, lane.client, "dropout", progress.step, part) for lane in progress.lanes
            ]
            total, count = self.losses(layout.named(progress.params), rows, seeds, scale)
            sums += total
            counts += count
        whole = counts.clamp(min=1)
        assert progress.params.grad is not None
        progress.params.grad /= (whole * scale).unsqueeze(1)
        return sums / whole

    def _micro(self, lane: Lane, step: int, part: int) -> list[Example]:
        size = self.recipe.batch
        return [lane.examples[i] for i in lane.order[step][part * size : (part + 1) * size]]

    def losses(
        self, params: Tensors, rows: Sequence[Sequence[Example]], seeds: Sequence[int], scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Run one batch forward and backward; return each client's summed loss and what it is summed over."""
        batch, lanes = self._batch(rows, seeds)
        batch = on_device(batch, self.loaded.device)
        one = len(rows) == 1
        inside = {name: value[0] for name, value in params.items()} if one else params
        with ExitStack() as stack:
            net = stack.enter_context(self.loaded.holding(inside))
            stack.enter_context(self.lift.over(lanes, lifted=not one))
            if self.mode == "packed":
                stack.enter_context(packing.packed(net, lanes))
            total, count = self.task.loss(net, batch)
            (total * scale).sum().backward()
        return total.detach(), count

    def _batch(self, rows: Sequence[Sequence[Example]], seeds: Sequence[int]) -> tuple[Batch, Lanes]:
        lanes = Lanes(clients=len(rows), seeds=list(seeds))
        if self.mode == "packed":
            assert self.task.pack
            batch = self.task.pack(rows)
            lanes = replace(lanes, tokens=batch["tokens"], lengths=batch["lengths"])
        else:
            batch = self.task.collate(rows, self.loaded.tokenizer.pad_token_id)
            own = [(len(part), max((len(row["ids"]) for row in part), default=1)) for part in rows]
            lanes = replace(lanes, rows=len(batch["input_ids"]), own=own)
        return batch, replace(lanes, selected=batch["counts"])


def _finished(lanes: Sequence[Lane], layout: Layout) -> Trained:
    params = torch.stack([lane.params for lane in lanes if lane.params is not None])
    state: State = {}
    for name in lanes[0].moments:
        rows = torch.stack([lane.moments[name] for lane in lanes])
        state[f"optimizer.{name}"] = {"step": rows} if name == "step" else layout.named(rows)
    named = {name: value.clone() for name, value in layout.named(params).items()}
    return Trained(named, state, [torch.stack(lane.losses).cpu() for lane in lanes])


def _out_of_memory(error: Exception) -> bool:
    """Tell an allocation that failed; the processor's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
