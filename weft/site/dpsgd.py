"""DP-SGD: each unit's gradient is clipped, the sum is noised and divided by the expected batch, and then trained with.

A unit is one record, or all records of a client that share a value of a column, such as a patient. Each step draws
every unit with the same chance, so that sizes vary and a batch may be empty: then the step is noise alone. The norm
is taken over all trained tensors together. Adding or removing a unit moves the sum by `clip` at most, so noise of
`noise * clip` makes each step a subsampled Gaussian mechanism. What follows (corrections of an algorithm, schedule,
weight decay, moments, the pipeline) sees nothing but the noised gradient. Abadi et al. 2016, arXiv:1607.00133.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core.errors import KeyProblem
from weft.core.task import Example
from weft.site.secret import Secret

RECORD = "record"
UNIT = "unit"  # key of an example: the number of its unit, where a unit is not a record
NUMBERS = 2**25  # of all adapters in one pass: each example has an adapter and a gradient of its own


@dataclass(frozen=True)
class DpSgd:
    """The job's `local.dp`."""

    clip: float
    noise: float
    """Standard deviation of the noise over `clip`."""
    unit: str = RECORD


@dataclass(frozen=True)
class Draws:
    """The private draws of one client in one round."""

    secret: Secret
    address: tuple[str | int, ...]
    """Round, client, and a digest of all that this round's training starts from."""

    def sampled(self, units: int, rate: float, step: int) -> list[int]:
        """Return the units of a step's batch: each is in it with the same chance, whatever the others are."""
        chance = self.secret.uniform(units, *self.address, "batch", step)
        chosen: list[int] = (chance < rate).nonzero()[:, 0].tolist()
        return chosen

    def noise(self, count: int, step: int) -> Tensor:
        """Return the standard normal noise of a step, float64."""
        return self.secret.normal(count, *self.address, "noise", step)


@dataclass(frozen=True)
class Slot:
    """One example with its own copy of its client's adapter."""

    row: int
    """The client's place in the block."""
    unit: int
    example: Example
    seed: int
    """Of the example's dropout."""


Gradients = Callable[[Sequence[Slot]], tuple[Tensor, Tensor]]
"""slots -> the gradient of each slot's own mean loss, (slots, numbers), and that loss, (slots,)."""


def units_of(examples: Sequence[Example]) -> list[list[int]]:
    """Return the places of each unit's examples."""
    found: dict[int, list[int]] = {}
    for place, example in enumerate(examples):
        found.setdefault(example.get(UNIT, place), []).append(place)
    return list(found.values())


def most_slots(longest: int, numbers: int, tokens: int) -> int:
    """Return how many slots go through the model in one pass of at most so many tokens."""
    return max(1, min(tokens // longest, NUMBERS // max(1, numbers)))


def clipped_sums(into: Tensor, slots: Sequence[Slot], gradients: Gradients, clip: float, most: int) -> Tensor:
    """Add each unit's clipped gradient to its client's row of `into`, (clients, numbers) float64; return all losses.

    Slots of one unit stand beside each other; at most `most` slots go through the model at a time, fewer where the
    memory ends, and a unit that a pass cuts in two is clipped once it is whole.
    """
    losses: list[Tensor] = []
    started: Tensor | None = None  # the sum of a unit whose last example is in a later pass
    for at in range(0, len(slots), most):
        part, after = slots[at : at + most], slots[at + most : at + most + 1]
        grads, loss = _within_memory(gradients, part)
        losses.append(loss)
        rows, sums = _by_unit(part, grads)
        if started is not None:
            sums[0] += started
        whole = not after or _unit(after[0]) != _unit(part[-1])
        started = None if whole else sums[-1]
        done = len(sums) if whole else len(sums) - 1
        into.index_add_(0, rows[:done], clipped(sums[:done], clip))
    return torch.cat(losses) if losses else into.new_zeros(0)


def _unit(slot: Slot) -> tuple[int, int]:
    return slot.row, slot.unit


def _by_unit(slots: Sequence[Slot], grads: Tensor) -> tuple[Tensor, Tensor]:
    """Return each unit's client, (units,), and the float64 sum of its slots' gradients, (units, numbers)."""
    number = {unit: place for place, unit in enumerate(dict.fromkeys(map(_unit, slots)))}
    where = torch.tensor([number[_unit(slot)] for slot in slots], device=grads.device)
    sums = torch.zeros(len(number), grads.shape[1], dtype=torch.float64, device=grads.device)
    rows = torch.tensor([row for row, _ in number], device=grads.device)
    return rows, sums.index_add_(0, where, grads.double())


def clipped(sums: Tensor, clip: float) -> Tensor:
    """Scale rows to a norm of at most `clip`; a row that is not finite counts as zero, which is within any bound."""
    norms = sums.norm(dim=1, keepdim=True)
    finite = norms.isfinite()
    factors = torch.where(finite, (clip / norms.clamp(min=torch.finfo(sums.dtype).tiny)).clamp(max=1.0), 0.0)
    return torch.where(finite, sums, 0.0) * factors


def _within_memory(gradients: Gradients, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
    """Return the gradients of slots, half of them at a time where the device's memory ends."""
    try:
        return gradients(slots)
    except torch.OutOfMemoryError:
        if len(slots) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(slots) // 2
    (first, one), (second, two) = _within_memory(gradients, slots[:half]), _within_memory(gradients, slots[half:])
    return torch.cat([first, second]), torch.cat([one, two])


def check_model(net: nn.Module) -> None:
    """Refuse a model whose layers mix the examples of a batch, so that no example has a gradient of its own."""
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise KeyProblem(
                ("local", "dp"),
                f"the base normalises over the batch ({name}), so that no record has a gradient of its own; choose a "
                "base with layer or group norm",
            )
