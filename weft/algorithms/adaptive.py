"""The server step that fedadagrad, fedadam and fedyogi share; they differ in how they keep the mean square.

d = sum_k p_k w_k - w; m <- beta1 m + (1 - beta1) d with m = 0 before the first round; v <- the rule's own, of v and
d^2, with v = tau^2 before the first round; w <- w + lr m / (sqrt(v) + tau). No bias correction. Reddi et al. 2021,
arXiv:2003.00295, Algorithm 2.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from weft.algorithms.fedavg import fedavg
from weft.core import trees
from weft.core.types import Algorithm, State, Tally, Tensors

Square = Callable[[Tensor, Tensor], Tensor]
"""(v, d^2) -> the next v."""


def adaptive_step(square: Square, lr: float, beta1: float, tau: float) -> Algorithm:
    """Return fedavg with the adaptive server step."""

    def init(adapter: Tensors) -> State:
        first = {name: torch.full_like(value, tau**2) for name, value in adapter.items()}
        return {"adapter": adapter, "mean": trees.zeros(adapter), "square": first}

    def server(state: State, update: State, tally: Tally) -> State:
        change = trees.subtract(update["adapter"], state["adapter"])
        mean = {name: beta1 * m + (1 - beta1) * change[name] for name, m in state["mean"].items()}
        squares = {name: square(v, change[name].square()) for name, v in state["square"].items()}
        step = {name: m / (squares[name].sqrt() + tau) for name, m in mean.items()}
        return {"adapter": trees.add(state["adapter"], step, lr), "mean": mean, "square": squares}

    return replace(fedavg(), init=init, server=server, reach=None)
