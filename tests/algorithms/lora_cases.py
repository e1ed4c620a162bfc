"""Rounds of LoRA rules on tensors alone, and the float64 dense truth beside them.

Three layers: one square with sides equal to the rank, so that both factors have one shape, and two that are not; a
head of two plain tensors. alpha/rank is 2.5. A client takes one step on gradients drawn for it, at ranks of any number;
what it ended with is read where training ends, and so owes nothing to the rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from weft.adapters.lora import lora
from weft.core import keys, pipeline, trees
from weft.core.measure import MeanUpdate
from weft.core.sums import Sum
from weft.core.types import Algorithm, At, Facts, Gradient, Parcel, Reply, State, Tally, Tensors
from weft.links import wire
from weft.transforms.weigh import weigh

RANK, ALPHA = 4, 10.0
SCALE = ALPHA / RANK
LAYERS = {"x.q_proj": (4, 4), "x.v_proj": (5, 7), "y.q_proj": (9, 6)}
"""Layer -> (out, in)."""
HEAD = {"head.bias": (3,), "head.weight": (3, 4)}
SIZES = {"a": 3, "b": 1, "c": 4}
"""Client -> examples: shares 3/8, 1/8 and 4/8."""
PLAIN, STABLE = lora(rank=RANK, alpha=ALPHA), lora(rank=RANK, alpha=ALPHA, rslora=True)


def draw(shape: Sequence[int], *address: str | int) -> Tensor:
    return keys.normal(shape, 5, *address)


def first(begun: bool = False, rank: int = RANK) -> Tensors:
    """Return a first adapter; B is zero, or drawn where training has `begun`."""
    found: Tensors = {name: draw(shape, name) for name, shape in HEAD.items()}
    for layer, (out, inputs) in LAYERS.items():
        b, a = (f"base_model.model.{layer}.lora_{part}.default.weight" for part in "BA")
        found[a] = draw((rank, inputs), a) * 0.4
        found[b] = draw((out, rank), b) * 0.3 if begun else torch.zeros(out, rank)
    return dict(sorted(found.items()))


@dataclass
class OneStep:
    """A `Work` of one client that takes one step on drawn gradients."""

    client: str
    initial: Tensors
    round: int = 1
    rank: int = 0
    rate: float = 0.3
    same: bool = False
    """All clients have one gradient."""
    lr: float = 1.0
    momentum: float = 0.0
    ended: Tensors = field(default_factory=dict)

    @property
    def clients(self) -> tuple[str, ...]:
        return (self.client,)

    @property
    def examples(self) -> Tensor:
        return torch.tensor([SIZES.get(self.client, 1)])

    @property
    def steps(self) -> Tensor:
        return torch.tensor([1])

    @property
    def ranks(self) -> Tensor:
        return torch.tensor([self.rank])

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        return draw(shape, "fresh", self.round, "all" if self.same else self.client, name).unsqueeze(0)

    def train(self, start: Tensors, gradient: Gradient | None = None) -> Tensors:
        who = "all" if self.same else self.client
        grads = {name: draw(value.shape[1:], self.round, who, name).unsqueeze(0) for name, value in start.items()}
        grads = self._chained(grads, start)
        if gradient:
            grads = gradient(grads, start, torch.tensor([0]))
        ended = {name: value - self.rate * grads[name] for name, value in start.items()}
        self.ended = trees.pick(ended, 0)
        return ended

    def loss(self, adapter: Tensors) -> Tensor:
        return torch.zeros(1)

    def _chained(self, grads: Tensors, start: Tensors) -> Tensors:
        """Give a rank with B and A both zero no gradient, as the chain rule does."""
        result = dict(grads)
        for name, value in start.items():
            if ".lora_A." in name:
                other = name.replace(".lora_A.", ".lora_B.")
                dead = ((value == 0).all(2) & (start[other] == 0).all(1))[0]
                result[name] = grads[name].masked_fill(dead[None, :, None], 0.0)
                result[other] = grads[other].masked_fill(dead[None, None, :], 0.0)
        return result


@dataclass(frozen=True)
class Step:
    """What one round left: the state, what the server sent, each client's adapter and what it sent."""

    state: State
    served: Tensors
    ended: Mapping[str, Tensors]
    updates: Mapping[str, State]
    effective: Mapping[str, Tensors]
    kept: Mapping[str, State]
    received: State

    @property
    def bytes_up(self) -> dict[str, int]:
        return {name: trees.count(trees.flatten(update)) for name, update in self.updates.items()}


def one_round(
    algorithm: Algorithm,
    state: State,
    number: int = 1,
    *,
    initial: Tensors | None = None,
    sizes: Mapping[str, int] = SIZES,
    ranks: Mapping[str, int] | None = None,
    kept: Mapping[str, State] | None = None,
    rate: float = 0.3,
    same: bool = False,
) -> Step:
    """Run a round as run_round does, each part through the bytes of the wire."""
    initial = first() if initial is None else initial
    sent = wire.unpack(wire.pack({part: state[part] for part in algorithm.sends}))
    ended, updates, after, effective = {}, {}, {}, {}
    total, replies = Sum(), []
    for name in sizes:
        work = OneStep(name, trees.expand(initial, 1), number, (ranks or {}).get(name, 0), rate, same)
        had = (kept or {}).get(name) or algorithm.keep(initial)
        update, left = algorithm.client(work, trees.expand_state(sent, 1), trees.expand_state(had, 1))
        ended[name], after[name] = work.ended, trees.pick_state(left, 0)
        parcel = Parcel(algorithm.cut(trees.pick_state(update, 0)), sizes[name])
        parcel = pipeline.down([("weigh", weigh())], At(5, number, name), parcel)
        updates[name] = wire.unpack(wire.pack(parcel.update))
        replies.append(Reply(name, number, updates[name], parcel.weight, sizes[name]))
        if not algorithm.combine:
            total.add(updates[name], parcel.weight)
        found = algorithm.effective
        effective[name] = (
            found(sent, updates[name], initial) if found else algorithm.serve({**sent, **updates[name]}, left, initial)
        )
    tally = Tally(number, dict(sizes), dict(sizes), len(sizes))
    replies.sort(key=lambda reply: reply.client)
    update = algorithm.combine(replies, state, tally) if algorithm.combine else total.divided(tally.total)
    state = wire.unpack(wire.pack(algorithm.server(state, update, tally)))
    served = {} if algorithm.personal else algorithm.serve(state, {}, initial)
    return Step(state, served, ended, updates, effective, after, sent)


def dense(tensors: Tensors, scale: float = SCALE) -> Tensors:
    """Return dW = scale B A of each layer, (out, in), float64, from nothing but the names."""
    found = {}
    for name, factor in tensors.items():
        if ".lora_A.default.weight" in name:
            left = tensors[name.replace("lora_A", "lora_B")]
            found[name.split(".lora_A")[0]] = scale * torch.einsum("or,ri->oi", left.double(), factor.double())
    return found


def mean_dense(ended: Mapping[str, Tensors], sizes: Mapping[str, int] = SIZES) -> Tensors:
    """Return sum_k p_k dW_k."""
    whole = sum(sizes.values())
    parts = {name: dense(tensors) for name, tensors in ended.items()}
    return {
        layer: torch.stack([parts[name][layer] * (sizes[name] / whole) for name in parts]).sum(0)
        for layer in next(iter(parts.values()))
    }


def distance(got: Tensors, wanted: Tensors) -> float:
    """Return |got - wanted| / |wanted| over all layers."""
    assert got.keys() == wanted.keys()
    whole = sum(float(value.square().sum()) for value in wanted.values())
    wrong = sum(float((got[name] - value).square().sum()) for name, value in wanted.items())
    return float((wrong / whole) ** 0.5)


def error(step: Step, sizes: Mapping[str, int] = SIZES) -> float:
    """Return how far what the server serves is from the mean of the clients' dW."""
    return distance(dense(step.served), mean_dense(step.ended, sizes))


def journal_error(step: Step, sizes: Mapping[str, int] = SIZES, adapter: object = PLAIN) -> float:
    """Return the aggregation error as the journal measures it, from `effective` and the adapter's own products."""
    products: Callable = adapter.products  # type: ignore[attr-defined, type-arg]
    mean = MeanUpdate()
    for name, tensors in step.effective.items():
        mean.add(products(tensors), sizes[name])
    return mean.error(products(step.served))


def head_mean(step: Step, sizes: Mapping[str, int] = SIZES) -> Tensors:
    """Return the weighted mean of the plain tensors, float64."""
    whole = sum(sizes.values())
    return {
        name: torch.stack([step.ended[client][name].double() * (sizes[client] / whole) for client in sizes]).sum(0)
        for name in HEAD
    }


FACTS = Facts(3, 3, "adamw", 0.0, 0.0, "lora", True, False, ("weigh",))


def facts(**changes: object) -> Facts:
    return replace(FACTS, **changes)  # type: ignore[arg-type]


def pair(b: list[list[float]], a: list[list[float]]) -> Tensors:
    """Return the factors of one layer `m`, by hand."""
    return {"m.lora_A.default.weight": torch.tensor(a), "m.lora_B.default.weight": torch.tensor(b)}


def combined(algorithm: Algorithm, state: State, updates: Mapping[str, State], weights: Mapping[str, int]) -> State:
    """Return the state after a round with these updates."""
    tally = Tally(1, dict(weights), dict(weights), len(weights))
    replies = [Reply(name, 1, updates[name], weights[name], weights[name]) for name in sorted(updates)]
    if algorithm.combine:
        return algorithm.server(state, algorithm.combine(replies, state, tally), tally)
    total = Sum()
    for reply in replies:
        total.add(reply.update, reply.weight)
    return algorithm.server(state, total.divided(tally.total), tally)


def flat(tensors: Tensors, part: str) -> list[float]:
    """Return the numbers of the one factor of `pair`."""
    return [round(float(x), 6) for x in tensors[f"m.lora_{part}.default.weight"].flatten()]
