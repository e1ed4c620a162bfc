"""What differential privacy protects: single records, or all records that share a value of a column."""

from collections.abc import Callable, Sequence
from typing import Any

from weft.core.task import Encoded
from weft.data.split import column_values
from weft.job import Job
from weft.site.dpsgd import RECORD, UNIT


def unit_numbers(job: Job, records: Sequence[dict[str, Any]]) -> list[int] | None:
    """Return the number of each record's unit; None where each record is its own.

    Raise JobError for a record without a value in the column.
    """
    if job.local.dp is None or job.local.dp.unit == RECORD:
        return None
    number: dict[str, int] = {}
    values = column_values(records, job.local.dp.unit, "local.dp.unit")
    return [number.setdefault(value, len(number)) for value in values]


def encoded_by_unit(encode: Callable[[Sequence[int]], Encoded], chosen: Sequence[int], units: Sequence[int]) -> Encoded:
    """Encode some records unit by unit, so that each example knows its unit however many records are dropped."""
    groups: dict[int, list[int]] = {}
    for place in chosen:
        groups.setdefault(units[place], []).append(place)
    parts = [(unit, encode(places)) for unit, places in groups.items()]
    return Encoded(
        [{**example, UNIT: unit} for unit, part in parts for example in part.examples],
        sum(part.truncated for _, part in parts),
        sum(part.dropped for _, part in parts),
    )
