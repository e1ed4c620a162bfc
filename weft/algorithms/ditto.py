"""ditto: each client keeps an adapter of its own, pulled to the global one, which is trained as fedavg does.

Personal: v <- v - lr (grad F_k(v) + mu (v - w)) with w the received adapter, the same batches a second time; mu is the
paper's lambda. Global: fedavg, untouched by the personal adapters. Li et al. 2021, arXiv:2012.04221. mu 0 is local
training beside fedavg. A client's time a round doubles; the journal's loss is that of the personal adapter; a client
that was never asked uses the first adapter.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.algorithms.fedavg import fedavg
from weft.algorithms.proximal import pull
from weft.algorithms.refusals import one_rank
from weft.core.errors import JobError
from weft.core.types import Algorithm, Facts, State, Tensors, Work


def ditto(mu: Annotated[float, Field(ge=0)] = 0.1) -> Algorithm:
    """Train a global adapter by fedavg, and beside it one a client that stays near it.

    mu: the strength of the pull to the global adapter.
    """

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        update = work.train(received["adapter"])
        own = work.train(kept["personal"], pull(received["adapter"], mu))
        return {"adapter": update}, {"personal": own}

    def keep(adapter: Tensors) -> State:
        return {"personal": adapter}

    def serve(state: State, kept: State, initial: Tensors) -> Tensors:
        return kept["personal"]

    return replace(fedavg(), client=client, keep=keep, serve=serve, check=_check, personal=True)


def _check(facts: Facts) -> None:
    one_rank("ditto")(facts)
    if facts.dp:
        raise JobError(
            "ditto trains twice on the same records in a round, and local.dp accounts for once: leave local.dp out, or "
            "choose fedprox"
        )
    if facts.moments == "keep":
        raise JobError(
            "ditto trains two adapters at a client, and the optimizer's moments are kept for one: set local.moments "
            "to reset"
        )
