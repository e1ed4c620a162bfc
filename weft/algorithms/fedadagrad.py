"""fedadagrad: Adagrad at the server, dividing by the root of all squares so far.

v <- v + d^2, so the steps shrink with the rounds; the rest of the step stands in adaptive.py. Reddi et al. 2021,
arXiv:2003.00295. The first steps are of about lr, however small the updates are above tau: lr is in units of the
adapter, and 0.1 is much for LoRA.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from weft.algorithms.adaptive import adaptive_step
from weft.algorithms.refusals import one_rank
from weft.core.types import Algorithm


def fedadagrad(
    lr: Annotated[float, Field(gt=0)] = 0.01,
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    tau: Annotated[float, Field(gt=0)] = 1e-3,
) -> Algorithm:
    """Step by the mean update over the root of its summed squares.

    lr: the server's learning rate. beta1: how much of the mean update stays.
    tau: updates far below it are not enlarged.
    """

    def square(v: Tensor, squared: Tensor) -> Tensor:
        return v + squared

    return replace(adaptive_step(square, lr, beta1, tau), check=one_rank("fedadagrad"))
