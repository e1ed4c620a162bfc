"""frlora: in every round the clients begin with the first factors, and the mean that they reach is added to the base.

W <- W + scale (B A - B0 A0) with B, A the mean factors and B0, A0 the first; then B, A <- B0, A0. So the update is not
held to one small rank over the rounds, and with adapter.lora.init pissa each begins along the largest directions of
the base. Yan et al. 2025, "Federated Residual Low-Rank Adaptation of Large Language Models" (ICLR). The sum of all
rounds stays beside the base as ranks that nobody trains again (see flora): its rank grows by the adapter's a round, by
twice that with pissa, up to full rank, and travels down. The mean is that of the factors, so secure sums are enough.
Dropout reaches those ranks as well, as in flora.
"""

from typing import Annotated

from pydantic import Field

from weft.algorithms.refusals import low_rank as refuse
from weft.core import low_rank, trees
from weft.core.types import Algorithm, State, Tally, Tensors, Work


def frlora(max_rank: Annotated[int, Field(gt=0)] | None = None) -> Algorithm:
    """Add the mean of each round's factors to all before it, and begin again.

    max_rank: most ranks of the adapter, the best approximation of all; without it they are exact.
    """

    def init(adapter: Tensors) -> State:
        first = {name: factor.clone() for name, factor in low_rank.factors(adapter).items()}
        return {"adapter": adapter, "first": first}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        first = low_rank.factors(work.initial)
        side = low_rank.join(received["adapter"], low_rank.minus(first))
        start = trees.merged(received["adapter"], low_rank.above(side, first))
        ended = work.train(start, low_rank.frozen(side))
        return {"trained": low_rank.below(side, ended)}, kept

    def after(before: Tensors, first: Tensors, trained: Tensors) -> Tensors:
        whole = low_rank.join(before, low_rank.minus(first), trained)
        return trees.merged(trained, low_rank.bounded(low_rank.compact(whole, least=1), max_rank))

    def server(state: State, update: State, tally: Tally) -> State:
        return {"adapter": after(state["adapter"], state["first"], update["trained"]), "first": state["first"]}

    def effective(received: State, update: State, initial: Tensors) -> Tensors:
        return trees.merged(
            update["trained"], low_rank.join(received["adapter"], low_rank.minus(initial), update["trained"])
        )

    def origin(received: State, initial: Tensors) -> State:
        return {"trained": trees.merged(received["adapter"], low_rank.factors(initial))}

    check = refuse("frlora", still=True, anew=True)
    return Algorithm(client=client, server=server, init=init, effective=effective, origin=origin, check=check)
