"""fedprox: a proximal term keeps each client near what it received.

Client k minimises F_k(w) + mu/2 |w - w_t|^2, so mu (w - w_t) is added to the gradient of each step; the server takes
fedavg's mean. Li et al. 2020, arXiv:1812.06127. mu 0 gives the bits of fedavg. With adamw the pull goes through the
optimizer's scaling, as any part of a loss does; local.clip bounds the gradient with the pull in it.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.algorithms.fedavg import fedavg
from weft.algorithms.proximal import pull
from weft.algorithms.refusals import one_rank
from weft.core.types import Algorithm, State, Work


def fedprox(mu: Annotated[float, Field(ge=0)] = 0.01) -> Algorithm:
    """Average adapters that were trained with a pull to the received one.

    mu: the strength of the pull.
    """

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        start = received["adapter"]
        return {"adapter": work.train(start, pull(start, mu))}, kept

    return replace(fedavg(), client=client, check=one_rank("fedprox"))
