"""The update that a round expects of a client: names, shapes and types, known before anything arrives."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.core import trees
from weft.core.types import Algorithm, Gradient, State, Tensors


@dataclass(frozen=True)
class Untrained:
    """The `Work` of one client that trains nothing: what an algorithm makes of it has the shapes of a true update."""

    first: Tensors
    round: int
    clients: tuple[str, ...] = ("template",)
    examples: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.int64))
    steps: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.int64))
    ranks: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    lr: float = 1.0
    momentum: float = 0.0

    @property
    def initial(self) -> Tensors:
        """Return the first adapter with a client axis."""
        return trees.expand(self.first, 1)

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return zeros, (1, *shape)."""
        return torch.zeros(1, *shape)

    def train(self, start: Tensors, gradient: Gradient | None = None) -> Tensors:
        """Return where training started."""
        return {name: tensor.clone() for name, tensor in start.items()}

    def loss(self, adapter: Tensors) -> Tensor:
        """Return zero."""
        return torch.zeros(1)


def template(
    algorithm: Algorithm, received: State, initial: Tensors, number: int, clients: tuple[str, ...] = ()
) -> State:
    """Return what a client sends that does not train in round `number`: the names, shapes and types of an update.

    clients: those of the round, of which the first stands for all.
    """
    work = Untrained(initial, number, clients[:1] or ("template",))
    kept = trees.expand_state(algorithm.keep(initial), 1)
    update, _ = algorithm.client(work, trees.expand_state(received, 1), kept)
    return algorithm.cut(trees.pick_state(update, 0))
