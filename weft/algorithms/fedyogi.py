"""fedyogi: Yogi at the server, dividing by the root of a mean square that moves by additions.

v <- v - (1 - beta2) d^2 sign(v - d^2), which forgets large squares slowly and keeps v positive; the rest of the step
stands in adaptive.py. Reddi et al. 2021, arXiv:2003.00295; Yogi: Zaheer et al. 2018. A number that always moves one
way ends in steps of about lr, however small its updates are above tau: lr is in units of the adapter, and 0.1 is much
for LoRA.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.adaptive import adaptive_step
from weft.algorithms.refusals import one_rank
from weft.core.types import Algorithm


def fedyogi(
    lr: Annotated[float, Field(gt=0)] = 0.01,
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99,
    tau: Annotated[float, Field(gt=0)] = 1e-3,
) -> Algorithm:
    """Step by the mean update over the root of its mean squares.

    lr: the server's learning rate. beta1, beta2: how much of the mean and of the mean square stays.
    tau: updates far below it are not enlarged.
    """

    def square(v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - beta2) * squared * torch.sign(v - squared)

    return replace(adaptive_step(square, lr, beta1, tau), check=one_rank("fedyogi"))
