"""iid: records are dealt out at random, in equal numbers."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from weft.core.keys import permutation
from weft.data.records import Record
from weft.data.split import Assignment, Split, assemble


def iid(clients: Annotated[int, Field(gt=0)]) -> Split:
    """Deal records out at random; sizes differ by at most one.

    >>> sorted(map(len, iid(3).assign([{}] * 8, 7).values()))
    [2, 3, 3]
    """

    def assign(records: Sequence[Record], seed: int) -> Assignment:
        order = permutation(len(records), seed, "split", "iid")
        return assemble([order[client::clients] for client in range(clients)], "Lower `clients`.")

    return Split(assign)
