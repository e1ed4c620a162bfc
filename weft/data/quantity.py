"""quantity: clients differ in how much they have, not in what (quantity skew).

Q. Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022, arXiv:2102.02079.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated

from pydantic import Field

from weft.core.errors import JobError
from weft.core.keys import number, permutation
from weft.data.records import Record
from weft.data.split import Assignment, Split, assemble


def quantity(
    clients: Annotated[int, Field(gt=0)],
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 1.0,
    minimum: Annotated[int, Field(gt=0)] = 1,
) -> Split:
    """Give each client `minimum` records at random, and of the rest a share from a Dirichlet distribution."""

    def assign(records: Sequence[Record], seed: int) -> Assignment:
        import numpy as np

        spare = len(records) - clients * minimum
        if spare < 0:
            raise JobError(
                f"data.split.quantity: {len(records)} records cannot give {clients} clients {minimum} each. "
                "Lower `clients` or `minimum`."
            )
        draws = np.random.default_rng(number(seed, "split", "quantity", "sizes"))
        shares = draws.dirichlet([alpha] * clients).tolist()
        edges = _edges(shares, spare, minimum)
        order = permutation(len(records), seed, "split", "quantity", "records")
        groups = [order[start:end] for start, end in pairwise([0, *edges])]
        return assemble(groups, "Lower `clients`.")

    return Split(assign)


def _edges(shares: Sequence[float], spare: int, minimum: int) -> list[int]:
    """Return where each client's records end.

    >>> _edges([0.5, 0.25, 0.25], 8, 1)
    [5, 8, 11]
    """
    ends = [round(share * spare) for share in accumulate(shares)]
    ends[-1] = spare  # the shares sum to 1 only within rounding
    return [end + minimum * client for client, end in enumerate(ends, start=1)]
