"""flora: the clients' factors side by side, whose product is the mean of the products; new factors in each round.

B = [p_1 B_1 ... p_n B_n], A = [A_1; ...; A_n]: B A = sum_k p_k B_k A_k for any ranks, p_k once and the scale once.
Wang et al. 2024, arXiv:2409.05976. The paper merges the product into the base. Here it stays beside it as ranks that
nobody trains again: a quantised base is not rounded anew, a late client gets the whole history, and what is served is
one adapter, whose rank grows by that of all clients a round, up to full rank, and travels down. Each client begins a
round with B = 0 and its own A, normal with the spread of peft's first one, 1/sqrt(3 in). While a client trains,
adapter.lora.dropout reaches the ranks of earlier rounds too, which it would not in a merged base.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from weft.algorithms.refusals import low_rank as refuse
from weft.algorithms.stacking import any_ranks, mean_rest, shares, trained
from weft.core import low_rank, trees
from weft.core.types import Algorithm, Reply, State, Tally, Tensors, Work


def flora(max_rank: Annotated[int, Field(gt=0)] | None = None) -> Algorithm:
    """Stack what the clients trained beside all that was stacked before.

    max_rank: most ranks of the adapter, the best approximation of all; without it they are exact.
    """

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        side = low_rank.factors(received["adapter"])
        start = trees.merged(received["adapter"], low_rank.above(side, low_rank.limited(_fresh(work), work.ranks)))
        ended = work.train(start, low_rank.frozen(side))
        return {"trained": low_rank.below(side, ended)}, kept

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        clients = trained(replies, state, tally)
        stack = low_rank.join(state["adapter"], low_rank.stacked(clients, shares(replies, tally)))
        whole = low_rank.bounded(low_rank.compact(stack, least=1), max_rank)
        return {"adapter": trees.merged(mean_rest(clients, replies, tally), whole)}

    def effective(received: State, update: State, initial: Tensors) -> Tensors:
        return low_rank.above(received["adapter"], update["trained"])

    check = refuse("flora", mixed=True, still=True, anew=True)
    return any_ranks(client, combine, effective=effective, check=check)


def _fresh(work: Work) -> Tensors:
    """Return each client's factors of this round: A drawn, B zero."""
    first = low_rank.factors(work.initial)
    result = {name: torch.zeros_like(value) for name, value in first.items()}
    for _, a in low_rank.pairs(first):
        inputs = first[a].shape[-1]
        result[a] = work.draw(a, first[a].shape[1:]).to(first[a]) * (3 * inputs) ** -0.5
    return result
