"""Train a block of clients over the one frozen base; every tensor has a leading client axis."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Literal

import torch
from torch import Tensor

from weft.core import keys
from weft.core.types import Example, State, Task, Tensors
from weft.site.model import Loaded

FLOAT16_SCALE = 1024.0  # keeps float16 gradients of a frozen float16 base above underflow


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


@dataclass(frozen=True)
class Trained:
    """What came out of a client's round."""

    params: Tensors
    """(clients, *shape) float32 on the CPU."""
    moments: State
    losses: Tensor
    """(clients, steps): the mean loss of each step's examples before the step."""


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


def _optimizer(params: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(params, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(params, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _restore(optimizer: torch.optim.Optimizer, params: Tensors, moments: State) -> None:
    """Put saved moments back: parts `optimizer.<moment>`, each by parameter name."""
    for part, tree in moments.items():
        for name, value in tree.items():
            moment = value[0].clone() if part == "optimizer.step" else value.to(params[name].device, copy=True)
            optimizer.state[params[name]][part.removeprefix("optimizer.")] = moment


def _moments(optimizer: torch.optim.Optimizer, params: Tensors) -> State:
    state: State = {}
    for name, parameter in params.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                row = value.expand(len(parameter)) if key == "step" else value
                state.setdefault(f"optimizer.{key}", {})[name] = row.detach().cpu().clone()
    return state


@contextmanager
def _drawing(seed: int, round_: int, client: str, step: int) -> Iterator[None]:
    """Let dropout draw from the address of this step."""
    with torch.random.fork_rng():
        torch.manual_seed(keys.number(seed, round_, client, "dropout", step))
        yield


def _has_dropout(net: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in net.modules()) or any(
        getattr(net.config, key, 0) for key in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    )


def clip(grads: Tensors, most: float) -> Tensors:
    """Scale each client's gradient so that its joint norm is at most `most`."""
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads.values()]).norm(dim=0)
    factor = (most / (norms + 1e-6)).clamp(max=1.0)
    return {name: grad * factor.view(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}


@dataclass
class Block:
    """One block of clients in training; today a block is one client, and the client axis has length 1."""

    loaded: Loaded
    task: Task
    recipe: Recipe
    seed: int
    round: int
    client: str
    examples: Sequence[Example]

    def train(self, start: Tensors, moments: State, gradient: Callable[[Tensors, Tensors], Tensors] | None) -> Trained:
        """Take all steps of this round from `start`, shapes (1, *shape)."""
        device = self.loaded.device
        params = {name: value.to(device, copy=True).requires_grad_() for name, value in start.items()}
        optimizer = _optimizer(list(params.values()), self.recipe)
        if self.recipe.moments == "keep":
            _restore(optimizer, params, moments)
        order = batches(len(self.examples), self.recipe, self.seed, self.round, self.client)
        self.loaded.net.train()
        drawing = _has_dropout(self.loaded.net)
        losses = []
        for step, chosen in enumerate(order):
            done = (self.round - 1 + step / len(order)) / self.recipe.rounds
            optimizer.param_groups[0]["lr"] = self.recipe.rate(done)
            with _drawing(self.seed, self.round, self.client, step) if drawing else nullcontext():
                losses.append(self._backward(params, [self.examples[i] for i in chosen]))
            self._correct(params, gradient)
            optimizer.step()
            optimizer.zero_grad()
        self.loaded.net.eval()
        finished = {name: value.detach().cpu() for name, value in params.items()}
        return Trained(finished, _moments(optimizer, params), torch.stack(losses, 1).cpu())

    def _backward(self, params: Tensors, examples: Sequence[Example]) -> Tensor:
        """Add up the gradients of one step's micro-batches; return the mean loss, shape (1,)."""
        size, pad = self.recipe.batch, self.loaded.tokenizer.pad_token_id
        micro = [self.task.collate(examples[i : i + size], pad) for i in range(0, len(examples), size)]
        scale = FLOAT16_SCALE if next(self.loaded.net.parameters()).dtype == torch.float16 else 1.0
        sums, counts = [], []
        for batch in micro:
            batch = {name: tensor.to(self.loaded.device) for name, tensor in batch.items()}
            with self.loaded.holding({name: value[0] for name, value in params.items()}) as net:
                total, count = self.task.loss(net, batch, 1)
                (total * scale).sum().backward()
            sums.append(total.detach())
            counts.append(count)
        whole = torch.stack(counts).sum(0).clamp(min=1)
        for value in params.values():
            if value.grad is not None:
                value.grad /= whole.view(-1, *[1] * (value.dim() - 1)) * scale
        return torch.stack(sums).sum(0) / whole

    def _correct(self, params: Tensors, gradient: Callable[[Tensors, Tensors], Tensors] | None) -> None:
        """Apply the algorithm's correction, then the per-client clipping."""
        grads = {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in params.items()}
        if gradient:
            grads = gradient(grads, params)
        if self.recipe.clip is not None:
            grads = clip(grads, self.recipe.clip)
        for name, value in params.items():
            value.grad = grads[name]
