"""multi_krum: the plain mean of the `chosen` clients with the best krum scores.

Blanchard et al. 2017, "Machine Learning with Adversaries"; m `chosen` <= n - f - 2, all of them where it is not given.
Each chosen client counts once, whatever size it declares. For LoRA pairs the mean is that of the products B A, brought
back to the adapter's rank (effective.py): a mean of factors would be spoilt by one client whose factors are 1e6 and
1e-6 with an honest product, which no distance between products sees. The server holds all replies of a round.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from weft.algorithms.effective import gram, mean, squared_distances
from weft.algorithms.fedavg import fedavg
from weft.algorithms.krum import krum_scores
from weft.algorithms.refusals import adapters, at_least
from weft.core.types import Algorithm, Reply, State, Tally


def multi_krum(
    byzantine: Annotated[int, Field(ge=0)] = 1, chosen: Annotated[int, Field(gt=0)] | None = None
) -> Algorithm:
    """Average the updates of the clients with the nearest neighbours.

    byzantine: how many clients of a round may send anything (f). chosen: how many are averaged (m).
    """
    least = max(2 * byzantine + 3, (chosen or 1) + byzantine + 2)

    def combine(replies: Sequence[Reply], state: State, tally: Tally) -> State:
        trained = adapters(replies, state, tally, least)
        scores = krum_scores(squared_distances(gram(trained, state["adapter"])), byzantine)
        count = chosen or len(trained) - byzantine - 2
        best = sorted(range(len(trained)), key=scores.__getitem__)[:count]
        return {"adapter": mean([trained[i] for i in best], [1 / count] * count, state["adapter"])}

    check = at_least("multi_krum", least, *(("chosen", chosen) if chosen else ("byzantine", byzantine)))
    return replace(fedavg(), combine=combine, check=check)
