"""Elementwise optimizers over a stack of clients: parameters and moments are (clients, numbers), one rate a client."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Moments = dict[str, Tensor]
"""Moment -> (clients, numbers); `step` -> (clients, 1), how many steps each client's moments have seen."""

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # as in torch.optim.AdamW


@dataclass(frozen=True)
class Optimizer:
    """SGD with momentum, or AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), as torch.optim defines them."""

    name: Literal["adamw", "sgd"]
    weight_decay: float
    momentum: float

    def start(self, params: Tensor) -> Moments:
        """Return fresh moments."""
        if self.name == "sgd" and not self.momentum:
            return {}
        names = ("exp_avg", "exp_avg_sq") if self.name == "adamw" else ("momentum_buffer",)
        step = torch.zeros(len(params), 1, dtype=params.dtype, device=params.device)
        return {"step": step} | {name: torch.zeros_like(params) for name in names}

    @torch.no_grad()
    def step(self, params: Tensor, grads: Tensor, moments: Moments, rate: Tensor) -> None:
        """Change parameters and moments in place; rate: (clients, 1)."""
        if "step" in moments:
            moments["step"] += 1
        if self.name == "adamw":
            self._adamw(params, grads, moments, rate)
        else:
            self._sgd(params, grads, moments, rate)

    def _sgd(self, params: Tensor, grads: Tensor, moments: Moments, rate: Tensor) -> None:
        if self.weight_decay:
            grads = grads.add(params, alpha=self.weight_decay)
        if self.momentum:
            grads = moments["momentum_buffer"].mul_(self.momentum).add_(grads)
        params.sub_(grads * rate)

    def _adamw(self, params: Tensor, grads: Tensor, moments: Moments, rate: Tensor) -> None:
        steps = moments["step"].double()
        first, second = (1 - BETA1**steps), (1 - BETA2**steps).sqrt()
        if self.weight_decay:
            params.mul_(1 - rate * self.weight_decay)
        mean = moments["exp_avg"].lerp_(grads, 1 - BETA1)
        square = moments["exp_avg_sq"].mul_(BETA2).addcmul_(grads, grads, value=1 - BETA2)
        denominator = (square.sqrt() / second.to(params.dtype)).add_(EPSILON)
        params.sub_(mean / denominator * (rate.double() / first).to(params.dtype))
