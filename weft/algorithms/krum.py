"""krum: the one client whose update lies nearest to those of the others.

Score of client i: the sum of its n - f - 2 smallest squared distances to others; the smallest score wins. Blanchard et
al. 2017, "Machine Learning with Adversaries". Up to f `byzantine` clients may send anything, of n >= 2 f + 3. Sizes are
ignored. Distances are between effective updates dW = B A (effective.py), so that the choice does not depend on the
gauge of the factors; the winner's B A is taken in factors near the received ones, so that factors of 1e6 and 1e-6 with
an honest product do no harm. Every other tensor is taken bit for bit. The server holds all replies of a round.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.effective import gram, mean, squared_distances
from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import adapters, at_least
from weft.core.types import Algorithm, Reply, State, Tally


def krum(byzantine: Annotated[int, Field(ge=0)] = 1) -> Algorithm:
    """Take the update of the client with the nearest neighbours.

    byzantine: how many clients of a round may send anything (f).
    """
    least = 2 * byzantine + 3

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        trained = adapters(replies, state, tally, least)
        scores = krum_scores(squared_distances(gram(trained, state["adapter"])), byzantine)
        best = min(range(len(trained)), key=scores.__getitem__)
        return {"adapter": mean([trained[best]], [1.0], state["adapter"])}

    check = at_least("krum", least, "byzantine", byzantine)
    return replace(fedavg(), combine=combine, check=check)


def krum_scores(distances: Tensor, byzantine: int) -> list[float]:
    """Return the sum of each row's n - f - 2 smallest squared distances to others; distances: (clients, clients)."""
    clients = len(distances)
    others = distances + torch.diag(torch.full((clients,), torch.inf, dtype=distances.dtype))
    scores: list[float] = others.sort(dim=1).values[:, : clients - byzantine - 2].sum(1).tolist()
    return scores
