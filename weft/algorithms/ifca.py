"""ifca: several adapters at once; each client trains the one that has the least loss on its own records.

j(k) = argmin_j F_k(w_j), measured on all training records of the client before it trains; then fedavg within each
cluster (experts.py). Ghosh et al. 2020, arXiv:2006.04088. All clusters begin as the first adapter, on which their
losses are equal; so in the first `dealt` rounds clients are dealt to clusters at random, and what sets the clusters
apart is a direction in which clients differ. Which clusters come out depends on that draw: compare several seeds. One
cluster is fedavg to the bit. A client goes through its records once more a round for each cluster, and all clusters
travel down. A client that was never asked uses the first cluster; `adapters/` in the run folder holds one a cluster.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.experts import no_noise, routed
from weft.algorithms.refusals import one_rank
from weft.core.errors import JobError
from weft.core.types import Algorithm, Facts, Tensors, Work


def ifca(clusters: Annotated[int, Field(gt=0)] = 2, dealt: Annotated[int, Field(ge=0)] = 1) -> Algorithm:
    """Average within clusters that clients choose by their loss.

    clusters: how many adapters there are. dealt: rounds in which clients do not choose yet.
    """

    def choose(work: Work, adapters: list[Tensors]) -> Tensor:
        if clusters == 1 or work.round <= dealt:
            return work.draw("cluster", (clusters,)).argmax(1)
        return torch.stack([work.loss(adapter) for adapter in adapters]).argmin(0)

    return routed([f"cluster-{i}" for i in range(clusters)], choose, _check)


def _check(facts: Facts) -> None:
    one_rank("ifca")(facts)
    no_noise("ifca", facts)
    if facts.dp:
        raise JobError(
            "ifca chooses a client's cluster by the losses on its own records, and local.dp adds no noise to that: "
            "leave local.dp out, or choose task_experts, which goes by names"
        )
    if facts.moments == "keep":
        raise JobError(
            "ifca trains another adapter when a client changes its cluster, for which the optimizer's moments mean "
            "nothing: set local.moments to reset"
        )
