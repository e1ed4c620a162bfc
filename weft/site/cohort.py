"""Train a block of clients over the one frozen base: one forward and one backward pass for all of them.

Each client keeps its own batches, loss, gradient clipping, learning rate, optimizer state and number of steps; the
result is that of training them one by one. Clients that are done leave the block: their rows are cut off.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from weft.core import keys
from weft.core.errors import RunError
from weft.core.low_rank import Resting
from weft.core.task import Batch, Example, Task
from weft.core.trees import on_device
from weft.core.types import Gradient, State, Tensors
from weft.site import dpsgd, packing
from weft.site.dpsgd import Draws, Slot
from weft.site.lanes import Lanes
from weft.site.lift import Lift
from weft.site.model import Loaded
from weft.site.optimizers import Moments, Optimizer
from weft.site.recipe import Recipe, batches

TOKENS = {"cpu": 1024, "cuda": 32768}  # tokens of a step that keep a device busy; more only costs memory
FLOAT16_SCALE = 1024.0  # keeps float16 gradients of a frozen float16 base above underflow
Mode = Literal["packed", "padded", "single"]


@dataclass
class Lane:
    """One client of a block: its data, its batches, and what comes out."""

    row: int
    client: str
    examples: Sequence[Example]
    order: list[list[int]]
    """The examples of each step; with private draws the units."""
    draws: Draws | None = None
    units: list[list[int]] = field(default_factory=list)
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

    @property
    def sizes(self) -> list[int]:
        """Return the numbers of each tensor."""
        return [torch.Size(shape).numel() for shape in self.shapes.values()]

    def rests(self, rests: Callable[[str], bool] | None) -> Tensor:
        """Tell of each number whether it belongs to a tensor that rests, (numbers,)."""
        parts = [torch.full((size,), bool(rests and rests(n))) for n, size in zip(self.shapes, self.sizes, strict=True)]
        return torch.cat(parts)

    def flat(self, stack: Tensors) -> Tensor:
        """Return (clients, *shape) tensors as (clients, numbers)."""
        return torch.cat([stack[name].flatten(1) for name in self.shapes], 1)

    def named(self, flat: Tensor) -> Tensors:
        """Return views of (clients, numbers) by name, (clients, *shape); gradients flow back in one piece."""
        sizes = self.sizes
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
    halt: Callable[[], bool] = lambda: False
    """Whether to stop before the next step, since nobody waits for what comes out."""

    @property
    def optimizer(self) -> Optimizer:
        """Return the elementwise optimizer of the recipe."""
        return Optimizer(self.recipe.optimizer, self.recipe.weight_decay, self.recipe.momentum)

    def train(
        self,
        round_: int,
        clients: Mapping[str, Sequence[Example]],
        start: Tensors,
        moments: State,
        gradient: Gradient | None,
        draws: Mapping[str, Draws] | None = None,
    ) -> Trained:
        """Take all steps of a round from `start`, shapes (clients, *shape); `draws`: where training is private."""
        layout = Layout({name: tuple(start[name].shape[1:]) for name in sorted(start)})
        lanes = [
            self._lane(row, name, examples, round_, draws[name] if draws else None)
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

    def _lane(self, row: int, client: str, examples: Sequence[Example], round_: int, draws: Draws | None) -> Lane:
        if draws is None:
            assert self.recipe.dp is None
            return Lane(row, client, examples, batches(len(examples), self.recipe, self.seed, round_, client))
        units, rate = dpsgd.units_of(examples), self.recipe.expected(len(examples)) / len(examples)
        order = [draws.sampled(len(units), rate, step) for step in range(self.recipe.steps_of(len(examples)))]
        return Lane(row, client, examples, order, draws, units)

    def _run(self, progress: Progress, layout: Layout, round_: int, gradient: Gradient | None) -> None:
        """Step until every client is done; where memory runs out, go on from the same step with half the clients."""
        progress = progress.retire()
        while progress.lanes:
            if self.halt():
                raise RunError("training was stopped")
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
                self.loaded.below.kept.let_go()
                torch.cuda.empty_cache()
                self.notice(f"out of memory with {len(progress.lanes)} clients in a block; going on with {half}")
                for part in halves:
                    self._run(part, layout, round_, gradient)
                return
            progress.step += 1
            progress = progress.retire()

    def _step(self, progress: Progress, layout: Layout, round_: int, gradient: Gradient | None) -> None:
        """Take one optimizer step of every client in the block."""
        losses = (self._private if self.recipe.dp else self._backward)(progress, layout, round_, gradient)
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

    @property
    def _scale(self) -> float:
        return FLOAT16_SCALE if next(self.loaded.net.parameters()).dtype == torch.float16 else 1.0

    def _private(self, progress: Progress, layout: Layout, round_: int, gradient: Gradient | None) -> Tensor:
        """Set one step's noised gradients; return each client's mean loss over its batch, (clients,)."""
        dp, params, lanes = self.recipe.dp, progress.params.detach(), progress.lanes
        assert dp is not None
        resting = layout.rests(gradient.rests if isinstance(gradient, Resting) else None).to(params.device)
        units = [unit for row, lane in enumerate(lanes) for unit in self._units(row, lane, progress.step, round_)]
        slots = [slot for unit in sorted(units, key=self._longest) for slot in unit]  # alike lengths share a pass

        def gradients(part: Sequence[Slot]) -> tuple[Tensor, Tensor]:
            grads, loss = self._apart(params, part, layout)
            return grads.masked_fill(resting, 0.0), loss

        sums = torch.zeros(params.shape, dtype=torch.float64, device=params.device)
        tokens = TOKENS[self.loaded.device.type]
        most = 1 if self.mode == "single" else dpsgd.most_slots(self._longest(slots), params.shape[1], tokens)
        losses = dpsgd.clipped_sums(sums, slots, gradients, dp.clip, most)
        for row, lane in enumerate(lanes):
            assert lane.draws is not None
            noise = lane.draws.noise(params.shape[1], progress.step).to(params.device)
            sums[row] += dp.noise * dp.clip * noise.masked_fill(resting, 0.0)
            sums[row] /= self.recipe.expected(len(lane.examples))
        progress.params.grad = sums.to(params.dtype)
        rows = torch.tensor([slot.row for slot in slots], dtype=torch.int64, device=params.device)
        counts = torch.bincount(rows, minlength=len(lanes)).clamp(min=1)
        return torch.zeros(len(lanes), device=params.device).index_add_(0, rows, losses.float()) / counts

    def _longest(self, slots: Sequence[Slot]) -> int:
        return max((self.task.length(slot.example) for slot in slots), default=1)

    def _units(self, row: int, lane: Lane, step: int, round_: int) -> list[list[Slot]]:
        """Return a step's examples, those of a unit together."""

        def slot(unit: int, i: int) -> Slot:
            return Slot(row, unit, lane.examples[i], keys.number(self.seed, round_, lane.client, "dropout", step, i))

        return [[slot(unit, i) for i in lane.units[unit]] for unit in lane.order[step]]

    def _apart(self, params: Tensor, slots: Sequence[Slot], layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the gradient of each example's own mean loss, (slots, numbers), and that loss, (slots,)."""
        flat = params[[slot.row for slot in slots]].requires_grad_()
        rows, seeds = [[slot.example] for slot in slots], [slot.seed for slot in slots]
        total, count = self.losses(layout.named(flat), rows, seeds, self._scale)
        assert flat.grad is not None
        return flat.grad / (count * self._scale).unsqueeze(1), total / count

    def _backward(self, progress: Progress, layout: Layout, round_: int, gradient: Gradient | None) -> Tensor:
        """Add up the gradients of one step's micro-batches; return each client's mean loss, (clients,)."""
        scale = self._scale
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
        one = self.mode == "single"
        inside = {name: value[0] for name, value in params.items()} if one else params
        with ExitStack() as stack:
            net = stack.enter_context(self.loaded.holding(inside))
            stack.enter_context(self.lift.over(lanes, lifted=not one))
            if self.mode == "packed":
                stack.enter_context(self.loaded.below.over(net, batch) if self.recipe.repeated else nullcontext())
                stack.enter_context(packing.packed(net, lanes))
            total, count = self.task.loss(net, on_device(batch, self.loaded.device))
            (total * scale).sum().backward()
        return total.detach(), count

    @torch.no_grad()
    def mean_loss(self, params: Tensors, examples: Sequence[Example]) -> float:
        """Return one client's mean loss over its examples, in batches of the recipe, without dropout."""
        total = count = 0.0
        inside = {name: value.to(self.loaded.device) for name, value in params.items()}
        with self.loaded.holding(inside) as net:
            for start in range(0, len(examples), self.recipe.batch):
                rows = [examples[start : start + self.recipe.batch]]
                batch = self.task.collate(rows, self.loaded.tokenizer.pad_token_id)
                summed, over = self.task.loss(net, on_device(batch, self.loaded.device))
                total, count = total + float(summed), count + float(over)
        return total / max(count, 1.0)

    def _batch(self, rows: Sequence[Sequence[Example]], seeds: Sequence[int]) -> tuple[Batch, Lanes]:
        lanes = Lanes(clients=len(rows), seeds=list(seeds))
        if self.mode == "packed":
            assert self.task.pack
            batch = self.task.pack(rows)
            lanes = replace(lanes, tokens=batch["tokens"], lengths=batch["lengths"])
        else:
            batch = self.task.collate(rows, self.loaded.tokenizer.pad_token_id)
            own = [(len(part), max((len(row.get("ids", ())) for row in part), default=1)) for part in rows]
            tensors = batch["input_ids"] if "input_ids" in batch else batch["pixel_values"]
            lanes = replace(lanes, rows=len(tensors), own=batch.get("own", own))
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
