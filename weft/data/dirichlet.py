"""dirichlet: each class is divided among the clients by shares from a Dirichlet distribution (label skew).

M. Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019,
arXiv:1905.12022.
"""

import warnings
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from weft.core.errors import JobError
from weft.data.records import Record
from weft.data.split import Assignment, Split, assemble, codes, column_values, seed32


def dirichlet(
    alpha: Annotated[float, Field(gt=0, le=1e6)],
    clients: Annotated[int, Field(gt=0)],
    by: Annotated[str, Field(min_length=1)] = "label",
    minimum: Annotated[int, Field(gt=0)] = 1,
) -> Split:
    """Divide each class of the column `by` among clients: alpha 0.1 is strong skew, 100 nearly none.

    A division that leaves a client fewer than `minimum` records is drawn anew, up to ten times.
    """

    def assign(records: Sequence[Record], seed: int) -> Assignment:
        classes = codes(column_values(records, by, "data.split.dirichlet.by"))
        return divide(classes, alpha, clients, minimum, seed32(seed, "dirichlet"))

    return Split(assign)


def divide(classes: Sequence[int], alpha: float, clients: int, minimum: int, seed: int) -> Assignment:
    """Divide places by their class among clients; `seed` has 32 bits."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    places = range(len(classes))
    partitioner = DirichletPartitioner(
        num_partitions=clients, partition_by="class", alpha=alpha, min_partition_size=minimum, seed=seed
    )
    partitioner.dataset = Dataset.from_dict({"class": list(classes), "place": list(places)})
    remedy = f"Raise `alpha` ({alpha:g}), or lower `clients` ({clients}) or `minimum` ({minimum})."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each failed draw warns; the error below says it once
            groups = [partitioner.load_partition(client)["place"] for client in range(clients)]
    except ValueError:
        raise JobError(
            f"data.split: no draw gave each client {minimum} or more of the {len(classes)} records. {remedy}"
        ) from None
    return assemble([list(group) for group in groups], remedy)
