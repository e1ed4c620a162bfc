"""A site handles an order: it trains or evaluates its clients over one resident base and replies for each."""

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.core import coding, keys, pipeline, trees
from weft.core.errors import RunError
from weft.core.length import at_length
from weft.core.metrics import added
from weft.core.pipeline import Pipeline
from weft.core.round import not_a_number
from weft.core.task import Example, Probe, Task
from weft.core.template import template
from weft.core.types import (
    Adapter,
    Algorithm,
    At,
    Metrics,
    Order,
    Parcel,
    Question,
    Reply,
    Server,
    State,
    Tensors,
    Wire,
)
from weft.fingerprints import tokenizer_print
from weft.secure.setting import fingerprint
from weft.site import guard
from weft.site.block import Block, BlockWork
from weft.site.cohort import TOKENS, Cohort
from weft.site.dpsgd import Draws
from weft.site.lift import virtual_tokens
from weft.site.memory import Memory
from weft.site.model import Loaded, peft_config, peft_names
from weft.site.recipe import Recipe
from weft.site.room import abreast, fitting
from weft.site.scores import keep_scores
from weft.site.secret import Secret, secret_of
from weft.site.twins import side_by_side, twin

if TYPE_CHECKING:  # cryptography is loaded where updates are masked, and nowhere else
    from weft.secure.member import Member

MOMENTS = "optimizer."  # parts of a client's memory that belong to its optimizer


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
    downlink: Pipeline = ()
    """The steps from the server to the clients."""


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
    """Clients trained together; 0: as many as fill a step with TOKENS, and as fit."""
    members: "Mapping[str, Member]" = field(default_factory=dict)
    """Client -> its half of secure aggregation, where the pipeline hides updates."""
    on_client: Callable[[str], None] = lambda client: None
    """Called after each client, for a progress display."""
    scores: Path | None = None
    """Where the scores of each test example are kept after the last round; they never travel. None: nowhere."""
    abreast: int = 0
    """The most blocks that are trained side by side; 0: as many as there are threads."""
    _lengths: dict[str, int] = field(default_factory=dict)
    _twins: list[Cohort] = field(default_factory=list)

    def handle(self, order: Order) -> Iterator[Reply]:
        """Yield one reply for each client of the order, block by block."""
        if order.kind != "train":
            for client in order.clients:
                yield self._evaluate(order, client)
                self.on_client(client)
            return
        order = replace(order, state=self._received(order))
        lost = self._lost(order)
        yield from (Reply(client, order.round, failure=why) for client, why in lost.items())
        order = replace(order, clients=tuple(name for name in order.clients if name not in lost))
        for block in self._trained(order):
            for reply in self._replies(order, block):
                self.on_client(reply.client)
                told = {**reply.metrics, "seconds": block.seconds} if reply.metrics else {}  # hidden: tells nothing
                yield replace(reply, metrics=told)

    def _trained(self, order: Order) -> Iterator[Block]:
        """Yield the blocks of an order as they are trained, side by side where there are threads for it."""
        blocks = self.blocks(order)
        cohorts = self._cohorts(min(self._abreast(order.clients), len(blocks)))
        if self.plan.recipe.dp:
            _ = self.secret  # made here, once: two threads would each make one

        def train(cohort: Cohort, clients: tuple[str, ...]) -> list[Block]:
            return self._attempt(order, clients, cohort)

        if len(cohorts) == 1:
            found: Generator[list[Block]] = (train(self.cohort, clients) for clients in blocks)
        else:
            found = side_by_side(cohorts, blocks[::-1], train)  # the longest first, so that all end together
        with closing(found):
            yield from (block for done in found for block in done)

    def _abreast(self, clients: Sequence[str]) -> int:
        """Return how many blocks of these clients are trained side by side."""
        most = self.abreast or torch.get_num_threads()
        if most == 1 or self.loaded.device.type != "cpu":
            return 1
        longest = max((self._length(name) for name in clients if name in self.train), default=1)
        tokens = max(TOKENS["cpu"] // 2, max(1, self.block) * self.plan.recipe.batch * longest)
        return max(1, min(most, len(clients), abreast(self.loaded, tokens)))

    def _cohorts(self, count: int) -> list[Cohort]:
        """Return as many engines: this site's own, and twins of it that are made once."""
        while len(self._twins) < count - 1:
            other = twin(self.loaded)
            self._twins.append(replace(self.cohort, loaded=other, lift=other.lift))
        return [self.cohort, *self._twins[: count - 1]]

    def _lost(self, order: Order) -> dict[str, str]:
        """Say who does not train from what the server sent, and why; rounding on the way down leaves no bound."""
        most = None if self.plan.downlink else guard.bound(self.plan.algorithm, self.wire, order.round - 1)
        if wrong := guard.too_far(order.state, self.initial, most):
            return dict.fromkeys(order.clients, wrong)
        if not self.members:
            return {}
        from weft.secure.member import without_keys

        return without_keys(self.members, order)

    def _received(self, order: Order) -> State:
        """Return the state of an order, decoded."""
        plan = self.plan
        if not plan.downlink:
            return order.state
        form = coding.form_down(plan.algorithm, self.initial)
        return coding.decode(plan.downlink, coding.at_down(plan.seed, order.round), order.state, form, free=True)

    def blocks(self, order: Order) -> list[tuple[str, ...]]:
        """Group clients that are alike in what they keep, in steps and in length, so that a block wastes nothing."""
        here, lanes = [name for name in order.clients if name in self.train], self._abreast(order.clients)
        groups: list[tuple[str, ...]] = []
        for fresh in (True, False):  # a client's first round begins without memories
            clients = [name for name in here if (order.since.get(name, 0) == 0) == fresh]
            alike = sorted(clients, key=lambda name: (len(self.train[name]), self._length(name), name))
            most = self.block or self._fitting(alike, lanes)
            groups += [tuple(alike[i : i + most]) for i in range(0, len(alike), most)]
        return groups

    def _length(self, client: str) -> int:
        """Return a client's mean tokens an example, or its longest where rows are padded to it."""
        if client not in self._lengths:
            lengths = [self.plan.task.length(row) for row in self.train[client]]
            self._lengths[client] = sum(lengths) // len(lengths) if self.cohort.mode == "packed" else max(lengths)
        return self._lengths[client]

    def _fitting(self, clients: Sequence[str], lanes: int) -> int:
        """Return how many clients of these a block has, where so many blocks are trained side by side."""
        if self.cohort.mode == "single" or not clients:
            return 1
        tokens = self.plan.recipe.batch * max(self._length(name) for name in clients)
        wanted = TOKENS[self.loaded.device.type] // (1 if lanes == 1 else 2)
        return max(1, min(wanted // tokens, fitting(self.loaded) // lanes, ceil(len(clients) / lanes)))

    def used(self, server: Server, client: str) -> Tensors:
        """Return the adapter that a client uses after the server's last round."""
        kept = self._kept(Order("evaluate", server.round, (client,), server.state, server.since), client)
        return self.plan.algorithm.serve(server.state, kept, self.initial)

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
    def secret(self) -> Secret:
        """Return what this site's privacy noise comes from."""
        return secret_of(self.memory.folder)

    @cached_property
    def wire(self) -> Wire:
        """Return what is known of an update that leaves a client."""
        return pipeline.check(self.plan.pipeline)

    @cached_property
    def initial(self) -> Tensors:
        """Return the first adapter, as it came from the public seed."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.loaded.initial.items()}

    def _attempt(self, order: Order, clients: tuple[str, ...], cohort: Cohort) -> list[Block]:
        """Train one block; where it fails, each of its clients alone, so that only those at fault are lost."""
        try:
            return [self._train(order, clients, cohort)]
        except RunError as error:
            if len(clients) == 1:
                return [Block(clients, failure=str(error))]
            return [block for client in clients for block in self._attempt(order, (client,), cohort)]

    def _train(self, order: Order, clients: tuple[str, ...], cohort: Cohort) -> Block:
        """Train one block; nothing leaves and nothing is written here."""
        begin, plan, size = time.perf_counter(), self.plan, len(clients)
        memories = [self._kept(order, client) for client in clients]
        steps = [_taken(memory, pipeline.MEMORY) for memory in memories]
        kept = trees.stack_states(memories)
        moments = _taken(kept, MOMENTS)
        ranks = torch.tensor([plan.ranks.get(name, 0) for name in clients])
        draws = self._draws(order, clients, memories) if plan.recipe.dp else {}
        data = {name: self.train[name] for name in clients}
        work = BlockWork(cohort, order.round, data, moments, ranks, draws)
        update, kept = plan.algorithm.client(work, trees.expand_state(order.state, size), kept)
        trained = work.done[-1]
        if plan.recipe.moments == "keep":
            kept = kept | trained.moments
        seconds = (time.perf_counter() - begin) / size
        return Block(clients, update, kept, steps, trained.losses, seconds=seconds)

    def _replies(self, order: Order, block: Block) -> list[Reply]:
        """Send what a block trained down the pipeline; what clients keep is on disk before their replies leave."""
        if block.failure:
            return [Reply(client, order.round, failure=block.failure) for client in block.clients]
        plan = self.plan
        seen = fingerprint(order.state) if self.members else b""
        replies = []
        for row, client in enumerate(block.clients):
            at, losses = self._at(order, client, seen), block.losses[row]
            own = plan.algorithm.cut(trees.pick_state(block.update, row))
            if why := _not_finite(own, losses, told=not (self.members or plan.recipe.dp)):
                replies.append(Reply(client, order.round, failure=why, not_finite=True))
                continue
            told = _told(losses, bool(plan.recipe.dp))
            parcel = Parcel(own, len(self.train[client]), kept=block.steps[row], metrics=told)
            try:
                replies.append(self._reply(order, at, parcel, trees.pick_state(block.kept, row)))
            except RunError as error:  # of this client alone: the others have made their masks, which is done once
                replies.append(Reply(client, order.round, failure=str(error)))
        return replies

    def _reply(self, order: Order, at: At, parcel: Parcel, kept: State) -> Reply:
        """Send one client's parcel down the pipeline, and keep what must be kept."""
        steps = at_length(self.plan.pipeline, order.length)
        if self.wire.encoded:
            form = template(self.plan.algorithm, order.state, self.initial, order.round, (at.client,))
            parcel = coding.encode(steps, at, parcel, form)
        else:
            parcel = pipeline.down(steps, at, parcel)
        if self.remembers:
            self.memory.save(at.client, at.round, kept | parcel.kept, order.since.get(at.client, 0))
        return Reply(at.client, at.round, parcel.update, parcel.weight, parcel.examples, parcel.metrics)

    def _at(self, order: Order, client: str, seen: bytes) -> At:
        """Return where a client's pipeline stands; `seen` is the fingerprint of what it was sent."""
        hide = None
        if client in self.members:
            hide = partial(self.members[client].hide, order.round, order.secure.get(client, b""), seen)
        start = self.plan.algorithm.origin(order.state, self.initial)
        noisy = self.wire.ring and self.wire.noise
        secret = keys.secret(self.secret.key, client) if noisy else b""
        return At(self.plan.seed, order.round, client, start, order.cohort, secret=secret, hide=hide)

    def _draws(self, order: Order, clients: Sequence[str], memories: Sequence[State]) -> dict[str, Draws]:
        """Bind each client's private draws to all that its training starts from: anything else gets other noise."""
        received = trees.digest(order.state)
        found = {}
        for client, memory in zip(clients, memories, strict=True):
            examples = trees.digest({"examples": _leaves(list(self.train[client]))})
            start = f"{received}{trees.digest(memory)}{examples}{self.plan.recipe}"
            digest = hashlib.sha256(start.encode()).hexdigest()
            found[client] = Draws(self.secret, (order.round, client, digest))
        return found

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
        leaner = nullcontext() if self.cohort.mode == "single" else self.cohort.lift.leaner()
        inside = {name: tensor.to(self.loaded.device) for name, tensor in adapter.items()}
        with leaner, self.loaded.holding(inside) as net:
            if task.each:
                return task.each(self._probe(net), examples, metrics)
            return [task.measure(self._probe(net), examples, metrics)]

    def _probe(self, net: torch.nn.Module) -> Probe:
        plan = self.plan
        return Probe(net, self.loaded.tokenizer, plan.evaluate_batch, plan.max_new_tokens, plan.generated)

    def answer(self, question: Question) -> Any:
        """Answer `describe`: what the server must know of the adapter before the first round; `secure.*`: messages."""
        if question.kind.startswith("secure.") and self.members:
            from weft.secure.member import answer

            return answer(self.members, question)
        if question.kind != "describe":
            raise RunError(f"a site cannot answer `{question.kind}`")
        net = self.loaded.net
        return {
            "adapter": self.initial,
            "peft_names": peft_names(net),
            "peft_config": peft_config(net, question.body["base"]),
            "fingerprint": self.loaded.fingerprint(),
            "tokenizer": tokenizer_print(self.loaded.words) if self.loaded.words is not None else "none",
            "trainable": trees.count(self.loaded.initial),
            "total": self.loaded.size,
            "secret": self.secret.name if self.plan.recipe.dp else None,
        }


def _taken(state: State, mark: str) -> State:
    """Take the parts whose names begin with a mark out of a state."""
    return {part: state.pop(part) for part in list(state) if part.startswith(mark)}


def _told(losses: Tensor, private: bool) -> Metrics:
    """Return what a client tells of its training; losses of training records are not noised, so they stay."""
    told = {"loss": float(losses.mean()), "last_loss": float(losses[-1])}
    return {"steps": float(len(losses))} | ({} if private else told)


def _leaves(value: Any, name: str = "") -> Tensors:
    """Return all that an example holds as tensors, whatever it is nested in."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping | list | tuple):
        inside = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {leaf: part for key, one in inside for leaf, part in _leaves(one, f"{name}/{key}").items()}
    return {name: torch.tensor(list(repr(value).encode()), dtype=torch.uint8)}


def _not_finite(update: State, losses: Tensor, told: bool) -> str | None:
    """Say what is not a number, and at which step, if a client may tell how many it takes."""
    if bad := trees.not_finite(update):
        return not_a_number(bad)
    if bool(torch.isfinite(losses).all()):
        return None
    step = int((~torch.isfinite(losses)).nonzero()[0])
    where = f" at step {step + 1} of {len(losses)}" if told else ""
    return f"the loss is not a number{where}; lower local.lr or set local.clip"
