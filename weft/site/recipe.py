"""How a client trains: its batches, its steps, its learning rate along the run."""

from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Literal

from weft.core import keys
from weft.site import dpsgd


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
    dp: dpsgd.DpSgd | None = None
    everyone: bool = True  # whether all clients train in each round

    @property
    def repeated(self) -> bool:
        """Tell whether each example is trained on more than twice."""
        return self.everyone and self.rounds * (1 if self.steps else self.epochs) > 2

    def expected(self, examples: int) -> int:
        """Return the examples of a step, which are those to expect of it where batches are drawn by chance."""
        return min(self.batch * self.accumulate, examples)

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
