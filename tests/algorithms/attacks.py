"""Honest and dishonest adapters for the tests of robust rules: nine clients, some of which send what they like."""

from collections.abc import Sequence

import torch

from tests.algorithms import reference
from weft.core import trees
from weft.core.types import Tensors
from weft.testing import toys

CLIENTS = 9
A, B = "m.lora_A.default.weight", "m.lora_B.default.weight"
ATTACKS = {
    "huge": lambda start, honest: {n: torch.full_like(v, 1e6) for n, v in start.items()},
    "sign-flipped": lambda start, honest: trees.add(start, trees.subtract(honest, start), -30.0),
    "scaled": lambda start, honest: trees.add(start, trees.subtract(honest, start), 1e4),
    "far away": lambda start, honest: {n: torch.full_like(v, -1e30) for n, v in start.items()},
}


def received() -> Tensors:
    """Return a global adapter as it is after some rounds: B is no longer zero."""
    return {**toys.adapter(), B: 0.5 * toys.draw((3, 2), "received")}


def honest(count: int) -> list[Tensors]:
    """Return adapters of clients with a common change and a small one of their own."""
    start = received()
    common = trees.subtract(reference.shifted(start, "common", 0.3), start)
    return [trees.add(reference.shifted(start, f"honest {i}", 0.05), common) for i in range(count)]


def attacked(attack: str, byzantine: int) -> tuple[list[Tensors], list[Tensors]]:
    """Return the honest adapters, and all nine with the dishonest ones among them."""
    good = honest(CLIENTS - byzantine)
    bad = [ATTACKS[attack](received(), good[i % len(good)]) for i in range(byzantine)]
    return good, [*bad[::2], *good, *bad[1::2]]


def within(result: Tensors, good: Sequence[Tensors]) -> bool:
    """Tell whether every number lies between the smallest and the largest that an honest client has sent."""
    stack = trees.stack(good)
    return all(
        bool(((v >= stack[n].min(0).values - 1e-6) & (v <= stack[n].max(0).values + 1e-6)).all())
        for n, v in result.items()
    )


def beyond(result: Tensors, good: Sequence[Tensors]) -> float:
    """Return the distance of dW from the honest mean, in units of the honest clients' largest distance from it."""
    rows = [reference.wide(toys.effective(reference.wide(adapter))) for adapter in good]
    center = {n: sum(row[n] for row in rows) / len(rows) for n in rows[0]}
    spread = max(trees.norm(trees.subtract(row, center)) for row in rows)
    return trees.norm(trees.subtract(toys.effective(reference.wide(result)), center)) / spread


def turns() -> list[torch.Tensor]:
    """Return gauges R, harmless and not: a rotation, a shear, 1e4 on everything, a swap with unlike lengths."""
    rows = ([[0.6, 0.8], [-0.8, 0.6]], [[1.0, 3.0], [0.0, 1.0]], [[1e4, 0.0], [0.0, 1e4]], [[0.0, 100.0], [0.01, 0.0]])
    return [torch.tensor(row, dtype=torch.float64) for row in rows]
