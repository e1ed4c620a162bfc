"""One block of clients: what an algorithm trains with, and what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.core import keys, trees
from weft.core.errors import RunError
from weft.core.task import Example
from weft.core.types import Gradient, State, Tensors
from weft.site.cohort import Cohort, Trained
from weft.site.dpsgd import Draws


@dataclass
class BlockWork:
    """The `Work` of one block of clients: what an algorithm's client half trains with."""

    cohort: Cohort
    round: int
    data: dict[str, Sequence[Example]]
    moments: State
    ranks: Tensor
    draws: Mapping[str, Draws] = field(default_factory=dict)
    """Each client's private draws, where training is differentially private."""
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
        """Train from `start` on the clients' own data; once a round where that spends privacy."""
        if self.draws and self.done:
            raise RunError("an algorithm trains twice in a round, and local.dp accounts for once; choose another one")
        self.done.append(self.cohort.train(self.round, self.data, start, self.moments, gradient, self.draws))
        return self.done[-1].params

    def loss(self, adapter: Tensors) -> Tensor:
        """Return each client's mean loss over all its training data, (clients,); client by client, without a block."""
        rows = self.data.values()
        return torch.tensor([self.cohort.mean_loss(trees.pick(adapter, i), row) for i, row in enumerate(rows)])


@dataclass(frozen=True)
class Block:
    """What a block's training left, before anything of it leaves or is kept."""

    clients: tuple[str, ...]
    update: State = field(default_factory=dict)
    """(clients, *shape)."""
    kept: State = field(default_factory=dict)
    """What each client remembers of its training, (clients, *shape)."""
    steps: Sequence[State] = ()
    """What the steps of each client's pipeline remember, from the round before."""
    losses: Sequence[Tensor] = ()
    """Each client's loss at each step."""
    failure: str = ""
    """Why nothing was trained; then all else is empty."""
    seconds: float = 0.0
    """A client's share of the time."""
