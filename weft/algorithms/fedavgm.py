"""fedavgm: server momentum on the mean update.

d = sum_k p_k w_k - w; v <- beta v + d with v = 0 before the first round; w <- w + lr v. Hsu et al. 2019,
arXiv:1909.06335 (there d has the other sign). A steady d ends in steps of lr d / (1 - beta): with momentum 0.9 lower
lr, or the clients' steps. On LoRA factors this is momentum of A and of B, not of B A.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import one_rank
from weft.core import trees
from weft.core.types import Algorithm, State, Tally, Tensors


def fedavgm(momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9, lr: Annotated[float, Field(gt=0)] = 1.0) -> Algorithm:
    """Step along a running sum of the mean updates.

    momentum: how much of the last step stays (beta). lr: the server's learning rate.
    """

    def init(adapter: Tensors) -> State:
        return {"adapter": adapter, "velocity": trees.zeros(adapter)}

    def server(state: State, update: State, tally: Tally) -> State:
        change = trees.subtract(update["adapter"], state["adapter"])
        velocity = trees.add(change, state["velocity"], momentum)
        # w + lr v, written from the mean w + d on: with momentum 0 and lr 1 these are the bits of fedavg.
        rest = {name: lr * v - change[name] for name, v in velocity.items()}
        return {"adapter": trees.add(update["adapter"], rest), "velocity": velocity}

    return replace(fedavg(), init=init, server=server, reach=None, check=one_rank("fedavgm"))
