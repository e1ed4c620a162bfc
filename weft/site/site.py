"""A site handles an order: it trains or evaluates its clients over one resident base and replies for each."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.core import pipeline, trees
from weft.core.errors import RunError
from weft.core.pipeline import Pipeline
from weft.core.types import (
    Adapter,
    Algorithm,
    At,
    Example,
    Metrics,
    Order,
    Parcel,
    Probe,
    Question,
    Reply,
    State,
    Task,
    Tensors,
)
from weft.site.cohort import Block, Recipe, Trained
from weft.site.memory import Memory
from weft.site.model import Loaded, peft_config, peft_names

MODE = "optimizer."  # parts of a client's memory that belong to its optimizer


@dataclass(frozen=True)
class Plan:
    """What every site of a job does alike."""

    task: Task
    adapter: Adapter
    algorithm: Algorithm
    pipeline: Pipeline
    recipe: Recipe
    seed: int
    evaluate_batch: int = 32
    max_new_tokens: int = 64
    generated: int | None = None


@dataclass
class ClientWork:
    """The `Work` of a block of one client: what an algorithm's client half trains with."""

    block: Block
    moments: State
    clients: tuple[str, ...] = field(init=False)
    examples: Tensor = field(init=False)
    steps: Tensor = field(init=False)
    lr: float = field(init=False)
    done: list[Trained] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clients = (self.block.client,)
        self.examples = torch.tensor([len(self.block.examples)])
        self.steps = torch.tensor([self.block.recipe.steps_of(len(self.block.examples))])
        self.lr = self.block.recipe.lr

    def train(self, start: Tensors, gradient: Callable[[Tensors, Tensors], Tensors] | None = None) -> Tensors:
        """Train from `start` on the clients' own data."""
        trained = self.block.train(start, self.moments, gradient)
        self.done.append(trained)
        return trained.params


@dataclass
class Site:
    """One base model, one device, one or more clients with their encoded examples."""

    plan: Plan
    loaded: Loaded
    train: Mapping[str, Sequence[Example]]
    test: Mapping[str, Sequence[Example]]
    memory: Memory
    on_client: Callable[[str], None] = lambda client: None
    """Called after each client, for a progress display."""

    def handle(self, order: Order) -> Iterator[Reply]:
        """Yield one reply for each client of the order that lives here."""
        for client in order.clients:
            start = time.perf_counter()
            reply = self._train(order, client) if order.kind == "train" else self._evaluate(order, client)
            reply.metrics["seconds"] = time.perf_counter() - start
            self.on_client(client)
            yield reply

    def _kept(self, order: Order, client: str) -> State:
        since = order.since.get(client, 0)
        if since and self.remembers:
            return self.memory.load(client, since)
        return self.plan.algorithm.keep(self.initial())

    @property
    def remembers(self) -> bool:
        """Tell whether clients keep anything between rounds."""
        return self.plan.recipe.moments == "keep" or bool(self.plan.algorithm.keep(self.initial()))

    def initial(self) -> Tensors:
        """Return the first adapter, as it came from the public seed."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.loaded.initial.items()}

    def _train(self, order: Order, client: str) -> Reply:
        plan, examples = self.plan, self.train[client]
        kept = self._kept(order, client)
        moments = {part: kept.pop(part) for part in list(kept) if part.startswith(MODE)}
        block = Block(self.loaded, plan.task, plan.recipe, plan.seed, order.round, client, examples)
        work = ClientWork(block, trees.expand_state(moments, 1))
        update, kept = plan.algorithm.client(work, trees.expand_state(order.state, 1), trees.expand_state(kept, 1))
        if plan.recipe.moments == "keep":
            kept = kept | work.done[-1].moments
        if self.remembers:
            self.memory.save(client, order.round, trees.pick_state(kept, 0), order.since.get(client, 0))
        parcel = Parcel(trees.pick_state(update, 0), len(examples))
        parcel = pipeline.down(plan.pipeline, At(plan.seed, order.round, client), parcel)
        losses = work.done[-1].losses[0]
        metrics = {"loss": float(losses.mean()), "last_loss": float(losses[-1]), "steps": float(len(losses))}
        failure = None if bool(torch.isfinite(losses).all()) else _diverged(losses)
        return Reply(client, order.round, parcel.update, parcel.weight, len(examples), metrics, failure=failure)

    def _evaluate(self, order: Order, client: str) -> Reply:
        """Measure the adapter that a client uses, on every group of test examples here."""
        adapter = self.plan.algorithm.serve(order.state, self._kept(order, client))
        measured = {name: self.measure(adapter, rows, order.metrics) for name, rows in self.test.items()}
        return Reply(client, order.round, examples=sum(map(len, self.test.values())), measured=measured)

    @torch.no_grad()
    def measure(self, adapter: Tensors, examples: Sequence[Example], metrics: tuple[str, ...]) -> Metrics:
        """Return the task's sums over examples for one adapter."""
        self.loaded.net.eval()
        with self.loaded.holding({name: tensor.to(self.loaded.device) for name, tensor in adapter.items()}) as net:
            return self.plan.task.measure(self._probe(net), examples, metrics)

    def _probe(self, net: torch.nn.Module) -> Probe:
        plan = self.plan
        return Probe(net, self.loaded.tokenizer, plan.evaluate_batch, plan.max_new_tokens, plan.generated)

    def answer(self, question: Question) -> Any:
        """Answer `describe`: what the server must know of the adapter before the first round."""
        if question.kind != "describe":
            raise RunError(f"a site cannot answer `{question.kind}`")
        net = self.loaded.net
        return {
            "adapter": self.initial(),
            "peft_names": peft_names(net),
            "peft_config": peft_config(net, question.body["base"]),
            "fingerprint": self.loaded.fingerprint(),
            "trainable": trees.count(self.loaded.initial),
            "total": sum(parameter.numel() for parameter in net.parameters()),
        }


def _diverged(losses: Tensor) -> str:
    step = int((~torch.isfinite(losses)).nonzero()[0])
    return f"the loss is not a number at step {step + 1} of {len(losses)}; lower local.lr or set local.clip"
