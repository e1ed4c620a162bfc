"""rolora: the factors take turns, B in odd rounds and A in even ones; the other rests, so the mean is exact.

With one factor common to all clients sum_k p_k B_k A_k = (sum_k p_k B_k) A, and the same for A. B begins: while B is
zero, the gradient of A is zero too. Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating
Optimization of LoRA", arXiv:2502.01755. The turn is that of the round's number, so it survives a stop. Up: one factor.
Down: both, so that whoever is asked for the first time knows them.
"""

from weft.algorithms.refusals import low_rank as refuse
from weft.core import low_rank, trees
from weft.core.types import Algorithm, State, Tally, Tensors, Work


def rolora() -> Algorithm:
    """Train and average B in odd rounds, A in even rounds."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        rests = low_rank.A if work.round % 2 else low_rank.B
        ended = work.train(received["adapter"], low_rank.resting(lambda name: rests in name))
        return {"trained": {name: value for name, value in ended.items() if rests not in name}}, kept

    def server(state: State, update: State, tally: Tally) -> State:
        return {"adapter": trees.merged(state["adapter"], update["trained"])}

    def effective(received: State, update: State, initial: Tensors) -> Tensors:
        return trees.merged(received["adapter"], update["trained"])

    def origin(received: State, initial: Tensors) -> State:
        return {"trained": received["adapter"]}

    check = refuse("rolora", still=True, anew=True)
    return Algorithm(client=client, server=server, effective=effective, origin=origin, reach=1.0, check=check)
