"""The baselines that are trained: each is a federation like any other, with an algorithm of its own."""

from collections.abc import Sequence
from dataclasses import replace

from weft.algorithms.fedavg import fedavg
from weft.algorithms.local import local
from weft.core import low_rank
from weft.core.meeting import Secure
from weft.core.round import Federation
from weft.core.sampling import UNIFORM
from weft.core.types import Algorithm, State, Work
from weft.transforms.weigh import weigh

PLAIN = [("weigh", weigh())]


def federation_of(method: str, ours: Federation, secure: Secure | None = None) -> Federation:
    """Return the rounds of one method; a baseline is a federation like any other, and nothing leaves anyone."""
    algorithm = baseline(method)
    if not algorithm:
        return replace(ours, secure=secure)
    clients = (pooled_name(ours.clients),) if method == "centralized" else ours.clients
    plain = replace(ours, pipeline=PLAIN, downlink=(), sampler=UNIFORM, pace=None)
    return replace(plain, algorithm=algorithm, clients=clients, per_round=len(clients))


def baseline(method: str) -> Algorithm | None:
    """Return the algorithm of a baseline; None for any other method, which has the job's."""
    return {"local": local, "centralized": centralized}[method]() if method in ("local", "centralized") else None


def pooled_name(clients: Sequence[str]) -> str:
    """Return the name of the one client of centralized training.

    A single client keeps its name, so that centralized training draws its very batches.
    """
    return clients[0] if len(clients) == 1 else "centralized"


def centralized() -> Algorithm:
    """Return fedavg for one client that holds all records, with the largest rank that any client of the job has."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        return {"adapter": work.train(low_rank.limited(received["adapter"], work.ranks))}, kept

    return replace(fedavg(), client=client)
