"""local: every client trains its own adapter and sends nothing; the baseline that a federation must beat.

Each client starts from the shared first adapter, its first ranks where it has fewer (`clients.ranks`), and goes on from
its own in every later round.
"""

from weft.core import low_rank
from weft.core.types import Algorithm, State, Tally, Tensors, Work


def local() -> Algorithm:
    """Train each client alone; the global state never changes."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        return {}, {"adapter": work.train(low_rank.limited(kept["adapter"], work.ranks))}

    def server(state: State, update: State, tally: Tally) -> State:
        return state

    def keep(adapter: Tensors) -> State:
        return {"adapter": adapter}

    def serve(state: State, kept: State, initial: Tensors) -> Tensors:
        return kept["adapter"]

    return Algorithm(client=client, server=server, keep=keep, serve=serve, sends=(), personal=True)
