"""fedex_lora: the mean of the factors, and beside it what the mean of the products has more, so nothing is lost.

With A, B the means: sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B_n)(A_k - A), n the last client, because the deviations
of A sum to zero: (n - 1) rank more ranks. Singhal et al. 2025, arXiv:2410.09432. The paper adds them to the base. Here
they stay beside it as ranks that nobody trains: a quantised base is not rounded anew in each round, and a late client
gets all of them with the adapter. They grow from round to round, up to full rank, and travel down. While a client
trains, adapter.lora.dropout reaches them too, which it would not in the base.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from weft.algorithms.refusals import adapters
from weft.algorithms.refusals import low_rank as refuse
from weft.algorithms.stacking import mean, shares
from weft.core import low_rank
from weft.core.types import Algorithm, Reply, State, Tally, Tensors, Work


def fedex_lora(max_rank: Annotated[int, Field(gt=0)] | None = None) -> Algorithm:
    """Average both factors and keep what that leaves out as frozen ranks.

    max_rank: most frozen ranks, the best approximation of all; without it they are exact.
    """

    def init(adapter: Tensors) -> State:
        return {"adapter": adapter, "side": low_rank.no_ranks(adapter)}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        side = received["side"]
        ended = work.train(low_rank.above(side, received["adapter"]), low_rank.frozen(side))
        return {"adapter": low_rank.below(side, ended)}, kept

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        clients = adapters(replies, state, tally)
        whole = mean(clients, replies, tally)
        left_out = residual(clients, whole, shares(replies, tally))
        side = low_rank.compact(low_rank.join(state["side"], left_out))
        return {"adapter": whole, "side": low_rank.bounded(side, max_rank)}

    def server(state: State, update: State, tally: Tally) -> State:
        return update

    def serve(state: State, kept: State, initial: Tensors) -> Tensors:
        return low_rank.above(state["side"], state["adapter"])

    return Algorithm(
        client=client,
        server=server,
        init=init,
        serve=serve,
        combine=combine,
        sends=("adapter", "side"),
        check=refuse("fedex_lora", still=True, anew=True),
    )


def residual(clients: Sequence[Tensors], whole: Tensors, parts: Sequence[float]) -> Tensors:
    """Return factors of sum_k p_k B_k A_k - B A, with A and B the mean factors, `whole`."""
    last = clients[-1]
    apart = [
        {name: t.double() - (last if low_rank.B in name else whole)[name] for name, t in low_rank.factors(one).items()}
        for one in clients[:-1]
    ]
    return low_rank.stacked(apart, parts[:-1]) if apart else low_rank.no_ranks(whole)
