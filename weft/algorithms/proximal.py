"""The gradient of the proximal term mu/2 |w - anchor|^2, which fedprox, fednova and ditto add to each local step."""

from torch import Tensor

from weft.core import trees
from weft.core.types import Gradient, Tensors


def pull(anchor: Tensors, mu: float) -> Gradient:
    """Return the correction g -> g + mu (w - anchor); anchor: (clients, *shape)."""
    anchors = trees.by_rows(anchor)

    def gradient(grads: Tensors, params: Tensors, rows: Tensor) -> Tensors:
        return trees.add(grads, trees.subtract(params, anchors(rows)), mu)

    return gradient
