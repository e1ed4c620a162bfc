"""fedadam: Adam at the server, dividing by the root of a running mean square.

v <- beta2 v + (1 - beta2) d^2; the rest of the step stands in adaptive.py. Reddi et al. 2021, arXiv:2003.00295.
A number that always moves one way ends in steps of about lr, however small its updates are above tau: lr is in units
of the adapter, and 0.1 is much for LoRA.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from weft.algorithms.adaptive import adaptive_step
from weft.algorithms.refusals import one_rank
from weft.core.types import Algorithm


def fedadam(
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
        return beta2 * v + (1 - beta2) * squared

    return replace(adaptive_step(square, lr, beta1, tau), check=one_rank("fedadam"))
