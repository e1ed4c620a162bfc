"""lowrank: each matrix travels as the product of two thin ones, its best approximation of a rank.

M = U S V^T; left U_r sqrt(S_r), right sqrt(S_r) V_r^T (Eckart and Young 1936). For a LoRA factor of 16 ranks sent with
2 that is an eighth. A matrix that would not be smaller, and whatever is no matrix, travels as it is. On the way up what
is cut off can be kept for the next round, as PowerSGD does (Vogels et al. 2019, arXiv:1905.13727).
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.core.types import At, State, Tensors, Transform, Wire
from weft.transforms.error_feedback import coding, differences, unbounded

LEFT, RIGHT = ".left", ".right"


def lowrank(rank: Annotated[int, Field(gt=0)] = 2, feedback: bool = False) -> Transform:
    """Send matrices as thin factors.

    rank: of what travels. feedback: add what was cut off to the next update; not on the way down.
    """

    def encode(at: At, update: State) -> State:
        return {part: _thin(tree, rank) for part, tree in update.items()}

    def decode(at: At, update: State) -> State:
        return {part: {name: _whole(update[part], name) for name in tree} for part, tree in at.form.items()}

    def check(wire: Wire) -> Wire:
        if not wire.down or wire.encoded:
            differences(replace(wire, down=False))
        return replace(unbounded(wire, feedback), encoded="lowrank")

    return Transform(check=check, client=coding(encode, decode, feedback), arrive=decode, remembers=feedback)


def _thin(tree: Tensors, rank: int) -> Tensors:
    result: Tensors = {}
    for name, tensor in tree.items():
        if tensor.dim() == 2 and rank * sum(tensor.shape) < tensor.numel():
            result[name + LEFT], result[name + RIGHT] = halves(tensor, rank)
        else:
            result[name] = tensor
    return dict(sorted(result.items()))


def _whole(tree: Tensors, name: str) -> Tensor:
    return tree[name] if name in tree else (tree[name + LEFT].double() @ tree[name + RIGHT].double()).float()


def halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return float32 (rows, rank) and (rank, columns) with the nearest product; signs as in low_rank.svd."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.full((len(matrix), rank), torch.nan), torch.full((rank, matrix.shape[1]), torch.nan)
    u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = torch.where(vt.gather(1, vt.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).double()
    root = values[:rank].sqrt()
    return ((u * signs.T)[:, :rank] * root).float(), ((vt * signs)[:rank] * root.unsqueeze(1)).float()
