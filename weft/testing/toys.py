"""A toy federation: clients with quadratic losses, trained in blocks, without a language model.

The conformance checks run algorithms and transforms on it, and so can the tests of your own: a round takes
milliseconds, and a tensor that is no LoRA factor has a closed form, w = t + (1 - lr)^steps (w0 - t).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.core import coding, keys, pipeline, trees
from weft.core.buffered import advance
from weft.core.errors import RunError
from weft.core.length import at_length
from weft.core.pipeline import MEMORY, Pipeline, check
from weft.core.round import Federation
from weft.core.template import template
from weft.core.types import (
    Algorithm,
    At,
    Facts,
    Gradient,
    Link,
    Order,
    Parcel,
    Products,
    Question,
    Reply,
    Server,
    State,
    Tensors,
)
from weft.links import wire
from weft.links.local import Local
from weft.secure.member import Member, answer
from weft.secure.setting import fingerprint
from weft.secure.simulated import simulate

Make = Callable[[], Algorithm]

SHAPES = {
    "m.lora_A.default.weight": (2, 6),
    "m.lora_B.default.weight": (3, 2),
    "n.bias": (5,),
    "n.weight": (4, 3),
}
EFFECTIVE = {"m": (3, 6), "n.bias": (5,), "n.weight": (4, 3)}


def draw(shape: Sequence[int], *address: str | int) -> Tensor:
    """Return normal numbers of a shape; the same address gives the same numbers."""
    return torch.randn(tuple(shape), generator=keys.generator(0, "toy", *address))


def adapter() -> Tensors:
    """Return the first adapter: a LoRA pair named as peft does, with B zero, and two plain tensors."""
    first = {name: draw(shape, name) for name, shape in SHAPES.items()}
    return first | {"m.lora_B.default.weight": torch.zeros(3, 2)}


def products(tensors: Tensors) -> Products:
    """Return the effective updates of the LoRA pairs, with scale 1."""
    return {
        name.partition(".lora_A.")[0]: (tensors[name.replace(".lora_A.", ".lora_B.")], factor)
        for name, factor in tensors.items()
        if ".lora_A." in name
    }


def effective(tensors: Tensors) -> Tensors:
    """Return what the losses see: B A in place of a LoRA pair, every other tensor as it is."""
    plain = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    return plain | {module: left @ right for module, (left, right) in products(tensors).items()}


FACTS = Facts(
    clients=1,
    per_round=1,
    optimizer="sgd",
    weight_decay=0.0,
    momentum=0.0,
    adapter="lora",
    low_rank=True,
    mixed_ranks=False,
    pipeline=(),
)
"""A job of sgd and LoRA, as an algorithm's `check` sees it."""


@dataclass(frozen=True)
class Client:
    """A client whose loss is 0.5 |w - target|^2 over the effective weights w."""

    target: Tensors
    examples: int = 1
    steps: int = 4
    rank: int = 0
    """Ranks of the LoRA pair that it trains; 0: all."""

    def loss(self, tensors: Tensors) -> float:
        """Return the loss of an adapter."""
        return 0.5 * trees.norm(trees.subtract(effective(tensors), self.target)) ** 2

    def gradient(self, tensors: Tensors) -> Tensors:
        """Return the gradient: w - target for a plain tensor, by the chain rule for a LoRA pair."""
        error = trees.subtract(effective(tensors), self.target)
        grads = {name: error[name] for name in tensors if name in error}
        for module, (left, right) in products(tensors).items():
            grads[f"{module}.lora_A.default.weight"] = left.T @ error[module]
            grads[f"{module}.lora_B.default.weight"] = error[module] @ right.T
        return {name: grads[name] for name in tensors}


def client(name: str, examples: int = 1, steps: int = 4) -> Client:
    """Return a client whose target is drawn by its name, around a target that all share."""
    target = {part: draw(shape, part, "shared") for part, shape in EFFECTIVE.items()}
    own = {part: draw(shape, part, name) for part, shape in EFFECTIVE.items()}
    return Client(trees.add(target, own, 0.3), examples, steps)


@dataclass(frozen=True)
class Toy:
    """A federation of such clients; each takes its own number of gradient steps a round."""

    clients: Mapping[str, Client]
    per_round: int
    lr: float = 0.05
    momentum: float = 0.0

    def federation(self, algorithm: Algorithm, pipeline: Pipeline, downlink: Pipeline = ()) -> Federation:
        """Return the rounds of an algorithm over these clients."""
        names = tuple(self.clients)
        rounds = Federation(algorithm, pipeline, names, self.per_round, 7, products, adapter(), downlink=downlink)
        return replace(rounds, secret=b"a toy has no secrets")


def toy(per_round: int = 3) -> Toy:
    """Return a federation of five clients with unequal examples and steps."""
    sizes = {"a": (1, 2), "b": (2, 3), "c": (3, 4), "d": (1, 2), "e": (5, 6)}
    return Toy({name: client(name, *size) for name, size in sizes.items()}, per_round)


@dataclass
class ToyWork:
    """The `Work` of a block of toy clients; client by client, so that the block cannot change a bit.

    `gradient` sees the clients that still have steps left, longest first, as the real engine shows them.
    """

    clients: tuple[str, ...]
    members: tuple[Client, ...]
    lr: float
    examples: Tensor
    steps: Tensor
    ranks: Tensor
    initial: Tensors
    round: int
    momentum: float = 0.0

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return normal numbers, (clients, *shape), by the round, each client and a name."""
        return torch.stack([draw(shape, self.round, client, name) for client in self.clients])

    def train(self, start: Tensors, gradient: Gradient | None = None) -> Tensors:
        """Take each client's steps from `start`, shapes (clients, *shape)."""
        params = {name: value.clone() for name, value in start.items()}
        velocity = {name: torch.zeros_like(value) for name, value in start.items()}
        for step in range(int(self.steps.max())):
            moving = (self.steps > step).nonzero()[:, 0]
            rows = moving[self.steps[moving].argsort(descending=True, stable=True)]
            grads = trees.stack(self.members[i].gradient(trees.pick(params, i)) for i in rows.tolist())
            if gradient:
                grads = gradient(grads, {name: value[rows] for name, value in params.items()}, rows)
            for name, value in params.items():
                velocity[name][rows] = self.momentum * velocity[name][rows] + grads[name]
                value[rows] -= self.lr * velocity[name][rows]
        return params

    def loss(self, adapter: Tensors) -> Tensor:
        """Return each client's loss, (clients,)."""
        return torch.tensor([member.loss(trees.pick(adapter, i)) for i, member in enumerate(self.members)])


@dataclass
class ToySite:
    """The `Site` of some toy clients, trained in blocks of `block`; `memories` is its disk."""

    toy: Toy
    algorithm: Algorithm
    pipeline: Pipeline
    block: int = 2
    memories: dict[tuple[str, int], bytes] = field(default_factory=dict)
    downlink: Pipeline = ()
    members: Mapping[str, Member] = field(default_factory=dict)
    """Each client's half of secure aggregation."""

    def handle(self, order: Order) -> Iterator[Reply]:
        """Reply for each client of the order that lives here."""
        mine = [name for name in order.clients if name in self.toy.clients]
        if order.kind == "evaluate":
            for name in mine:
                yield self._evaluate(order, name)
        else:
            if self.downlink:
                form, at = coding.form_down(self.algorithm, adapter()), coding.at_down(7, order.round)
                order = replace(order, state=coding.decode(self.downlink, at, order.state, form, free=True))
            for start in range(0, len(mine), self.block):
                yield from self._train(order, tuple(mine[start : start + self.block]))

    def kept(self, name: str, since: int) -> State:
        """Return the memory that counts: of the round `since`, or what a client has before its first."""
        found = self.memories.get((name, since)) if since else None
        return wire.unpack(found) if found else self.algorithm.keep(adapter())

    def _remember(self, name: str, order: Order, kept: State) -> None:
        since = order.since.get(name, 0)
        for other, round_ in list(self.memories):
            if other == name and round_ not in (since, order.round):
                del self.memories[other, round_]
        self.memories[name, order.round] = wire.pack(kept)

    def _train(self, order: Order, names: tuple[str, ...]) -> Iterator[Reply]:
        members = tuple(self.toy.clients[name] for name in names)
        work = ToyWork(
            names,
            members,
            self.toy.lr,
            torch.tensor([member.examples for member in members]),
            torch.tensor([member.steps for member in members]),
            torch.tensor([member.rank for member in members]),
            trees.expand(adapter(), len(members)),
            order.round,
            self.toy.momentum,
        )
        memories = [self.kept(name, order.since.get(name, 0)) for name in names]
        steps = [{part: kept.pop(part) for part in list(kept) if part.startswith(MEMORY)} for kept in memories]
        kept = trees.stack_states(memories)
        update, kept = self.algorithm.client(work, trees.expand_state(order.state, len(names)), kept)
        for i, name in enumerate(names):
            own = self.algorithm.cut(trees.pick_state(update, i))
            try:
                parcel = self._sent(order, name, Parcel(own, members[i].examples, kept=steps[i], metrics={"loss": 1.0}))
            except RunError as error:
                yield Reply(name, order.round, failure=str(error))
                continue
            if memory := trees.pick_state(kept, i) | parcel.kept:
                self._remember(name, order, memory)
            yield Reply(name, order.round, parcel.update, parcel.weight, parcel.examples, parcel.metrics)

    def _hide(self, order: Order, name: str) -> Callable[[Tensor], Tensor] | None:
        if name not in self.members:
            return None
        inbox, seen = order.secure.get(name, b""), fingerprint(order.state)
        return partial(self.members[name].hide, order.round, inbox, seen)

    def _sent(self, order: Order, name: str, parcel: Parcel) -> Parcel:
        start = self.algorithm.origin(order.state, adapter())
        at = At(7, order.round, name, start, order.cohort, secret=name.encode(), hide=self._hide(order, name))
        steps = at_length(self.pipeline, order.length)
        if not pipeline.check(steps).encoded:
            return pipeline.down(steps, at, parcel)
        form = template(self.algorithm, order.state, adapter(), order.round, (name,))
        return coding.encode(steps, at, parcel, form)

    def _evaluate(self, order: Order, name: str) -> Reply:
        used = self.algorithm.serve(order.state, self.kept(name, order.since.get(name, 0)), adapter())
        return Reply(name, order.round, measured={name: {"loss": self.toy.clients[name].loss(used)}})

    def answer(self, question: Question) -> Any:
        """Answer messages of secure aggregation; give any other question back, so that a caller sees what arrived."""
        if question.kind.startswith("secure."):
            return answer(self.members, question)
        return {"kind": question.kind, "body": question.body, "clients": tuple(self.toy.clients)}


@dataclass(frozen=True)
class Shuffled:
    """A link that asks the clients, and so gives back their replies, in another order in each round."""

    link: Link
    seed: int

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Give back the replies in the drawn order."""
        places = keys.permutation(len(order.clients), self.seed, order.round, "arrival")
        yield from self.link.exchange(replace(order, clients=tuple(order.clients[i] for i in places)))

    def ask(self, question: Question) -> Sequence[Any]:
        """Ask every site."""
        return self.link.ask(question)


@dataclass(frozen=True)
class Direct:
    """A link without bytes: replies come as the sites made them."""

    sites: Sequence[ToySite]

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Hand the order itself to every site."""
        for site in self.sites:
            yield from site.handle(order)

    def ask(self, question: Question) -> Sequence[Any]:
        """Ask every site."""
        return [site.answer(question) for site in self.sites]


@dataclass
class Losing:
    """A link that loses a client's reply in one round, `times` times, after the client has stored what it keeps."""

    link: Link
    client: str
    round: int
    times: int = 1

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Give back all replies but the lost one."""
        for reply in self.link.exchange(order):
            if (reply.client, order.round) == (self.client, self.round) and self.times:
                self.times -= 1
            else:
                yield reply

    def ask(self, question: Question) -> Sequence[Any]:
        """Ask every site."""
        return self.link.ask(question)


def _as_it_is(federation: Federation) -> Federation:
    return federation


@dataclass(frozen=True)
class Played:
    """What a few rounds left behind: the servers after each round, and the adapter that each client uses."""

    servers: tuple[Server, ...]
    used: Mapping[str, Tensors]


def play(
    make: Make,
    pipeline: Pipeline,
    rounds: int = 4,
    *,
    toy: Toy,
    block: int = 2,
    arrival: int | None = None,
    restart: bool = False,
    lose: bool = False,
    downlink: Pipeline = (),
    through: Callable[[ToySite], Link] = lambda site: Local([site]),
    how: Callable[[Federation], Federation] = _as_it_is,
) -> Played:
    """Run an algorithm on a toy.

    restart: before every round the server goes through bytes and the algorithm is made anew, as after a stop.
    lose: every round is done twice, and the replies of the first time are lost after the clients kept theirs.
    arrival: draw the order of the clients of each round from this seed.
    through: the link to the site. how: changes the rounds, such as their policy for clients that fail.
    """
    algorithm, memories = make(), dict[tuple[str, int], bytes]()
    known = simulate("toy", tuple(toy.clients), toy.per_round, 7) if check(pipeline).hidden else None
    members, secure = (known.members(), known.coordinator()) if known else ({}, None)
    servers = [Server(algorithm.init(adapter()))]
    for _ in range(rounds):
        server = servers[-1]
        if restart:
            algorithm = make()
            server = replace(server, state=wire.unpack(wire.pack(server.state)), since=dict(server.since))
        link = through(ToySite(toy, algorithm, pipeline, block, memories, downlink, members))
        link = link if arrival is None else Shuffled(link, arrival)
        for _ in range(2 if lose else 1):
            federation = replace(toy.federation(algorithm, pipeline, downlink), secure=secure)
            after, _ = advance(server, how(federation), link)
        servers.append(after)
    site, last = ToySite(toy, algorithm, pipeline, block, memories), servers[-1]
    used = {
        name: algorithm.serve(last.state, site.kept(name, last.since.get(name, 0)), adapter()) for name in toy.clients
    }
    return Played(tuple(servers), used)
