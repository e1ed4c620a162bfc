"""by: one client for each value of a column, such as the hospital that a record comes from."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from weft.data.records import Record
from weft.data.split import Assignment, Split, group_by


def by(column: Annotated[str, Field(min_length=1)]) -> Split:
    """Make a client of each value of a column; test records are divided by it as well.

    >>> by("site").assign([{"site": "south"}, {"site": "north"}, {"site": "south"}], 7)
    {'north': [1], 'south': [0, 2]}
    """

    def assign(records: Sequence[Record], seed: int) -> Assignment:
        return group_by(records, column, "data.split.by")

    return Split(assign, column)
