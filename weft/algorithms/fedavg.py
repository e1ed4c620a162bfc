"""fedavg: the weighted mean of what the clients trained (on LoRA factors also known as FedIT).

w <- sum_k p_k w_k, with p_k from the pipeline's `weigh`. McMahan et al. 2017, arXiv:1602.05629; for LoRA
Zhang et al. 2023, arXiv:2305.05644, where the mean of the factors is not the mean of the products: the
journal's aggregation error says by how much. The trained weights travel, not their difference to what was
received, so that one client alone is returned bit for bit.
"""

from weft.algorithms.refusals import one_rank
from weft.core.types import Algorithm, State, Tally, Work


def fedavg() -> Algorithm:
    """Replace the global adapter by the weighted mean of the clients' adapters."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        return {"adapter": work.train(received["adapter"])}, kept

    def server(state: State, update: State, tally: Tally) -> State:
        return {"adapter": update["adapter"]}

    return Algorithm(client=client, server=server, reach=1.0, check=one_rank("fedavg"), stale=True)
