"""shards: records sorted by class are cut into equal shards, a few for each client (few classes a client).

B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
arXiv:1602.05629.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from weft.core.keys import permutation
from weft.data.records import Record
from weft.data.split import Assignment, Split, assemble, codes, column_values


def shards(
    clients: Annotated[int, Field(gt=0)],
    per_client: Annotated[int, Field(gt=0)] = 2,
    by: Annotated[str, Field(min_length=1)] = "label",
) -> Split:
    """Give each client exactly `per_client` shards of records sorted by the column `by`.

    Shard sizes differ by at most one, and no record is left over (flwr-datasets drops the remainder).
    """

    def assign(records: Sequence[Record], seed: int) -> Assignment:
        classes = codes(column_values(records, by, "data.split.shards.by"))
        mixed = permutation(len(records), seed, "split", "shards", "records")
        pieces = _cut(sorted(mixed, key=classes.__getitem__), clients * per_client)
        dealt = permutation(len(pieces), seed, "split", "shards", "deal")
        hands = [dealt[client * per_client : (client + 1) * per_client] for client in range(clients)]
        groups = [[place for piece in hand for place in pieces[piece]] for hand in hands]
        return assemble(groups, "Lower `clients` or `per_client`.")

    return Split(assign)


def _cut(order: Sequence[int], pieces: int) -> list[Sequence[int]]:
    """Cut into consecutive pieces whose lengths differ by at most one."""
    edges = [len(order) * piece // pieces for piece in range(pieces + 1)]
    return [order[start:end] for start, end in pairwise(edges)]
