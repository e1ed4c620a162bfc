"""A site handles an order: it trains or evaluates its clients over one resident base and replies for each."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.core import keys, pipeline, trees
from weft.core.errors import RunError
from weft.core.metrics import added
from weft.core.pipeline import Pipeline
from weft.core.types import (
    Adapter,
    Algorithm,
    At,
    Example,
    Gradient,
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
from weft.fingerprints import tokenizer_print
from weft.site.cohort import Cohort, Recipe, Trained
from weft.site.lift import virtual_tokens
from weft.site.memory import Memory
from weft.site.model import Loaded, peft_config, peft_names
from weft.site.scores import keep_scores

MOMENTS = "optimizer."  # parts of a client's memory that belong to its optimizer
TOKENS = {"cpu": 1024, "cuda": 32768}  # tokens of a step that keep a device busy; more only costs memory


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
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Client -> ranks of a low-rank adapter that it trains; all where it is not named."""


@dataclass
class BlockWork:
    """The `Work` of one block of clients: what an algorithm's client half trains with."""

    cohort: Cohort
    round: int
    data: dict[str, Sequence[Example]]
    moments: State
    ranks: Tensor
    done: list[Trained] = field(default_factory=list)

    @property
    def clients(self) -> tuple[str, ...]:
        """Return the names along the client axis."""
        return tuple(self.data)

    @property
    def examples(self) -> Tensor:
        """Return the training examples of each client, (clients,)."""
        return torch.tensor([len(rows) for rows in self.data.values()])

    @property
    def steps(self) -> Tensor:
        """Return the optimizer steps of each client in this round, (clients,)."""
        return torch.tensor([self.cohort.recipe.steps_of(len(rows)) for rows in self.data.values()])

    @property
    def initial(self) -> Tensors:
        """Return the first adapter, once a client."""
        return trees.expand({n: p.detach().cpu() for n, p in self.cohort.loaded.initial.items()}, len(self.data))

    @property
    def lr(self) -> float:
        """Return the peak learning rate."""
        return self.cohort.recipe.lr

    @property
    def momentum(self) -> float:
        """Return the momentum of sgd."""
        return self.cohort.recipe.momentum

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, (clients, *shape), at the address of this round, each client and a name."""
        seed = self.cohort.seed
        return torch.stack([keys.normal(shape, seed, self.round, client, "draw", name) for client in self.data])

    def train(self, start: Tensors, gradient: Gradient | None = None) -> Tensors:
        """Train from `start` on the clients' own data."""
        self.done.append(self.cohort.train(self.round, self.data, start, self.moments, gradient))
        return self.done[-1].params


@dataclass
class Site:
    """One base model, one device, one or more clients with their encoded examples."""

    plan: Plan
    loaded: Loaded
    cohort: Cohort
    train: Mapping[str, Sequence[Example]]
    test: Mapping[str, Sequence[Example]]
    memory: Memory
    block: int = 0
    """Clients trained together; 0: as many as fill a step with TOKENS."""
    on_client: Callable[[str], None] = lambda client: None
    """Called after each client, for a progress display."""
    scores: Path | None = None
    """Where the scores of each test example are kept after the last round; they never travel. None: nowhere."""

    def handle(self, order: Order) -> Iterator[Reply]:
        """Yield one reply for each client of the order, block by block."""
        if order.kind != "train":
            for client in order.clients:
                yield self._evaluate(order, client)
                self.on_client(client)
            return
        for clients in self.blocks(order):
            start = time.perf_counter()
            replies = self._attempt(order, clients)
            seconds = (time.perf_counter() - start) / len(clients)
            for reply in replies:
                self.on_client(reply.client)
                yield replace(reply, metrics={**reply.metrics, "seconds": seconds})

    def blocks(self, order: Order) -> list[tuple[str, ...]]:
        """Group clients that are alike in what they keep, in steps and in length, so that a block wastes nothing."""
        here = [name for name in order.clients if name in self.train]
        groups: list[tuple[str, ...]] = []
        for fresh in (True, False):  # a client's first round begins without memories
            clients = [name for name in here if (order.since.get(name, 0) == 0) == fresh]
            alike = sorted(clients, key=lambda name: (len(self.train[name]), self._length(name), name))
            most = self.block or self._fitting(alike)
            groups += [tuple(alike[i : i + most]) for i in range(0, len(alike), most)]
        return groups

    def _length(self, client: str) -> int:
        """Return a client's mean tokens an example, or its longest where rows are padded to it."""
        lengths = [len(row["ids"]) for row in self.train[client]]
        return sum(lengths) // len(lengths) if self.cohort.mode == "packed" else max(lengths)

    def _fitting(self, clients: Sequence[str]) -> int:
        if self.cohort.mode == "single" or not clients:
            return 1
        tokens = self.plan.recipe.batch * max(self._length(name) for name in clients)
        return max(1, TOKENS[self.loaded.device.type] // tokens)

    def _kept(self, order: Order, client: str) -> State:
        since = order.since.get(client, 0)
        if since and self.remembers:
            return self.memory.load(client, since)
        return self.plan.algorithm.keep(self.initial)

    @cached_property
    def remembers(self) -> bool:
        """Tell whether clients keep anything between rounds."""
        plan = self.plan
        steps = any(transform.remembers for _, transform in plan.pipeline)
        return steps or plan.recipe.moments == "keep" or bool(plan.algorithm.keep(self.initial))

    @cached_property
    def initial(self) -> Tensors:
        """Return the first adapter, as it came from the public seed."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.loaded.initial.items()}

    def _attempt(self, order: Order, clients: Sequence[str]) -> list[Reply]:
        """Train one block; where it fails, each of its clients alone, so that only those at fault are lost."""
        try:
            return self._train(order, clients)
        except RunError as error:
            if len(clients) == 1:
                return [Reply(clients[0], order.round, failure=str(error))]
            return [reply for client in clients for reply in self._attempt(order, (client,))]

    def _train(self, order: Order, clients: Sequence[str]) -> list[Reply]:
        """Train one block; what clients keep is on disk before their replies leave."""
        plan, size = self.plan, len(clients)
        memories = [self._kept(order, client) for client in clients]
        steps = [_taken(memory, pipeline.MEMORY) for memory in memories]
        kept = trees.stack_states(memories)
        moments = _taken(kept, MOMENTS)
        ranks = torch.tensor([plan.ranks.get(name, 0) for name in clients])
        work = BlockWork(self.cohort, order.round, {name: self.train[name] for name in clients}, moments, ranks)
        update, kept = plan.algorithm.client(work, trees.expand_state(order.state, size), kept)
        trained = work.done[-1]
        if plan.recipe.moments == "keep":
            kept = kept | trained.moments
        replies = []
        for row, client in enumerate(clients):
            own = plan.algorithm.cut(trees.pick_state(update, row))
            parcel = self._parcel(order, client, own, steps[row])
            if self.remembers:
                memory = trees.pick_state(kept, row) | parcel.kept
                self.memory.save(client, order.round, memory, order.since.get(client, 0))
            replies.append(self._reply(order, client, parcel, trained.losses[row]))
        return replies

    def _parcel(self, order: Order, client: str, update: State, kept: State) -> Parcel:
        at = At(self.plan.seed, order.round, client, order.state, order.cohort)
        return pipeline.down(self.plan.pipeline, at, Parcel(update, len(self.train[client]), kept=kept))

    def _reply(self, order: Order, client: str, parcel: Parcel, losses: Tensor) -> Reply:
        if not bool(torch.isfinite(losses).all()):
            return Reply(client, order.round, failure=_diverged(losses), not_finite=True)
        metrics = {"loss": float(losses.mean()), "last_loss": float(losses[-1]), "steps": float(len(losses))}
        return Reply(client, order.round, parcel.update, parcel.weight, parcel.examples, metrics)

    def _evaluate(self, order: Order, client: str) -> Reply:
        """Measure the adapter that a client uses, on every group of test examples here."""
        adapter = self.initial
        if order.kind == "evaluate":
            adapter = self.plan.algorithm.serve(order.state, self._kept(order, client), self.initial)
        with self._bare() if order.kind == "untrained" else nullcontext():
            rows = {name: self.measure(adapter, examples, order.metrics) for name, examples in self.test.items()}
        last = order.kind == "untrained" or order.round == self.plan.recipe.rounds
        if self.scores and last and not self.plan.algorithm.personal:
            keep_scores(self.scores / f"{order.kind}.json", rows)
        measured = {name: added(found) for name, found in rows.items()}
        return Reply(client, order.round, examples=sum(map(len, self.test.values())), measured=measured)

    def _bare(self) -> AbstractContextManager[None]:
        """Leave out virtual tokens, which change a model from the start; other first adapters change nothing."""
        disabled: AbstractContextManager[None] = (
            self.loaded.net.disable_adapter() if virtual_tokens(self.loaded.net) else nullcontext()
        )
        return disabled

    @torch.no_grad()
    def measure(self, adapter: Tensors, examples: Sequence[Example], metrics: tuple[str, ...]) -> list[Metrics]:
        """Return the task's sums for one adapter: a row an example, or one for all where the task knows no other."""
        task = self.plan.task
        self.loaded.net.eval()
        with self.loaded.holding({name: tensor.to(self.loaded.device) for name, tensor in adapter.items()}) as net:
            if task.each:
                return task.each(self._probe(net), examples, metrics)
            return [task.measure(self._probe(net), examples, metrics)]

    def _probe(self, net: torch.nn.Module) -> Probe:
        plan = self.plan
        return Probe(net, self.loaded.tokenizer, plan.evaluate_batch, plan.max_new_tokens, plan.generated)

    def answer(self, question: Question) -> Any:
        """Answer `describe`: what the server must know of the adapter before the first round."""
        if question.kind != "describe":
            raise RunError(f"a site cannot answer `{question.kind}`")
        net = self.loaded.net
        return {
            "adapter": self.initial,
            "peft_names": peft_names(net),
            "peft_config": peft_config(net, question.body["base"]),
            "fingerprint": self.loaded.fingerprint(),
            "tokenizer": tokenizer_print(self.loaded.tokenizer),
            "trainable": trees.count(self.loaded.initial),
            "total": self.loaded.size,
        }


def _taken(state: State, mark: str) -> State:
    """Take the parts whose names begin with a mark out of a state."""
    return {part: state.pop(part) for part in list(state) if part.startswith(mark)}


def _diverged(losses: Tensor) -> str:
    step = int((~torch.isfinite(losses)).nonzero()[0])
    return f"the loss is not a number at step {step + 1} of {len(losses)}; lower local.lr or set local.clip"
