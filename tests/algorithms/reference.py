"""What the tests of algorithms share: a plain float64 way to train the toy clients, and clients with one number.

Nothing here uses the engine, the integer sum or the pipeline, so that an agreement means something.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from weft.algorithms.fedavg import fedavg
from weft.core import trees
from weft.core.round import sample
from weft.core.types import Algorithm, Reply, State, Tally, Tensors
from weft.testing import toys
from weft.testing.toys import Toy, ToyWork
from weft.transforms.weigh import weigh

MEAN = [("weigh", weigh())]
UNIFORM = [("weigh", weigh(by="uniform"))]
Correct = Callable[[Tensors, Tensors], Tensors]
"""(gradient, w) -> corrected gradient, of one client."""

FACTS = replace(toys.FACTS, clients=9, per_round=9, pipeline=("weigh",), lr=0.1)


def wide(tensors: Tensors) -> Tensors:
    return {name: value.double() for name, value in tensors.items()}


def trained(
    client: toys.Client, start: Tensors, lr: float, correct: Correct = lambda g, w: g, momentum: float = 0.0
) -> Tensors:
    """Take a client's gradient steps in float64."""
    goal, w = replace(client, target=wide(client.target)), dict(start)
    velocity = trees.zeros(w)
    for _ in range(client.steps):
        velocity = trees.add(correct(goal.gradient(w), w), velocity, momentum)
        w = trees.add(w, velocity, -lr)
    return w


def cohorts(toy: Toy, rounds: int) -> list[tuple[str, ...]]:
    """Return who is asked in each round; the draw is that of the rounds, which have tests of their own."""
    return [sample(toy.federation(fedavg(), MEAN), number) for number in range(1, rounds + 1)]


def mean(rows: Mapping[str, Tensors], weights: Mapping[str, float]) -> Tensors:
    total = sum(weights[name] for name in rows)
    names = next(iter(rows.values()))
    return {n: sum(weights[k] / total * row[n] for k, row in rows.items()) for n in names}


def sizes(toy: Toy) -> dict[str, float]:
    return {name: float(client.examples) for name, client in toy.clients.items()}


def far(got: Tensors, expected: Tensors) -> float:
    """Return the largest difference between two sets of named tensors, relative where numbers are large."""
    assert got.keys() == expected.keys()
    return max(float(((got[n].double() - expected[n]).abs() / (1 + expected[n].abs())).max()) for n in expected)


def ended(make: Callable[[], Algorithm], toy: Toy, rounds: int = 5, pipeline: Sequence = MEAN) -> Tensors:
    """Return the global adapter after some rounds of the real thing."""
    return toys.play(make, pipeline, rounds, toy=toy).servers[-1].state["adapter"]


# --- clients with one number


@dataclass(frozen=True)
class Number:
    """A client whose loss is curvature/2 (w - target)^2 over one number."""

    target: float
    curvature: float = 1.0

    def gradient(self, tensors: Tensors) -> Tensors:
        return {"w": self.curvature * (tensors["w"] - self.target)}


@dataclass
class Numbers:
    """A federation of such clients, all asked in every round, averaged by `weights`."""

    make: Callable[[], Algorithm]
    clients: Sequence[Number]
    steps: Sequence[int]
    lr: float
    start: float = 0.0
    weights: Sequence[int] = ()
    momentum: float = 0.0
    state: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = {"w": torch.tensor([self.start])}
        self.weights = self.weights or [1] * len(self.clients)
        self.state = self.make().init(first)
        self.kept = trees.expand_state(self.make().keep(first), len(self.clients))

    def round(self) -> float:
        """Run one round; return the global number."""
        algorithm, count = self.make(), len(self.clients)
        names = tuple(f"c{i}" for i in range(count))
        first = trees.expand({"w": torch.tensor([self.start])}, count)
        sizes_, steps = torch.tensor(self.weights), torch.tensor(self.steps)
        work = ToyWork(names, self.clients, self.lr, sizes_, steps, torch.zeros(count), first, 1, self.momentum)  # type: ignore[arg-type]
        sent = {part: self.state[part] for part in algorithm.sends}
        update, self.kept = algorithm.client(work, trees.expand_state(sent, count), self.kept)
        weights = dict(zip(names, self.weights, strict=True))
        rows = {name: trees.pick_state(update, i) for i, name in enumerate(names)}
        averaged = {part: mean({n: wide(row[part]) for n, row in rows.items()}, weights) for part in update}
        averaged = {part: {n: v.float() for n, v in tree.items()} for part, tree in averaged.items()}
        self.state = algorithm.server(self.state, averaged, Tally(1, weights, weights, count))
        return float(self.state["adapter"]["w"])

    def rounds(self, count: int) -> float:
        for _ in range(count):
            value = self.round()
        return value


def number(value: float) -> Tensors:
    return {"w": torch.tensor([value])}


def steps_of(algorithm: Algorithm, means: Sequence[float], start: float = 0.0) -> list[float]:
    """Return the global number after each server step with these means of the clients."""
    state, values = algorithm.init(number(start)), []
    for i, value in enumerate(means, 1):
        state = algorithm.server(state, {"adapter": number(value)}, Tally(i, {"a": 1}, {"a": 1}, 1))
        values.append(float(state["adapter"]["w"]))
    return values


# --- replies for rules that see them all


def combined(algorithm: Algorithm, adapters: Sequence[Tensors], start: Tensors, weights: Sequence[int] = ()) -> Tensors:
    """Return what a robust rule makes of these adapters."""
    names = [f"c{i}" for i in range(len(adapters))]
    counts = dict(zip(names, weights or [1] * len(names), strict=True))
    replies = [Reply(n, 1, {"adapter": a}, counts[n], counts[n]) for n, a in zip(names, adapters, strict=True)]
    state = {"adapter": start}
    assert algorithm.combine
    tally = Tally(1, counts, counts, len(names))
    return algorithm.server(state, algorithm.combine(replies, state, tally), tally)["adapter"]


def shifted(start: Tensors, name: str, size: float = 0.1) -> Tensors:
    """Return the start with a client's own small change."""
    return {n: value + size * toys.draw(value.shape, n, "shift", name) for n, value in start.items()}


def regauged(adapter: Tensors, turn: Tensor) -> Tensors:
    """Return (B R, R^-1 A) in place of (B, A): the same update in other factors."""
    a, b = "m.lora_A.default.weight", "m.lora_B.default.weight"
    return {**adapter, b: (adapter[b].double() @ turn).float(), a: (turn.inverse() @ adapter[a].double()).float()}
