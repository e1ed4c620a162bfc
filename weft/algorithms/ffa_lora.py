"""ffa_lora: A stays as it was drawn, for ever and for everyone; only B is trained, sent and averaged.

dW = scale B A is linear in B, so sum_k p_k B_k A_k = (sum_k p_k B_k) A: the mean is exact. Sun et al. 2024,
arXiv:2403.12313. A comes from the public seed and never travels: up and down rank * out a layer. A client of a lower
rank trains the first columns of B, and counts with zeros in the others.
"""

from weft.algorithms.refusals import low_rank as refuse
from weft.core import low_rank, trees
from weft.core.types import Algorithm, State, Tally, Tensors, Work


def ffa_lora() -> Algorithm:
    """Train B beside the frozen first A, and average it."""

    def init(adapter: Tensors) -> State:
        return {"adapter": {name: value for name, value in adapter.items() if not _rests(name)}}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        start = low_rank.limited(trees.merged(work.initial, received["adapter"]), work.ranks)
        return init(work.train(start, low_rank.resting(_rests))), kept

    def server(state: State, update: State, tally: Tally) -> State:
        return {"adapter": update["adapter"]}

    def serve(state: State, kept: State, initial: Tensors) -> Tensors:
        return trees.merged(initial, state["adapter"])

    check = refuse("ffa_lora", mixed=True, still=True)
    return Algorithm(client=client, server=server, init=init, serve=serve, reach=1.0, check=check, stale=True)


def _rests(name: str) -> bool:
    return low_rank.A in name
