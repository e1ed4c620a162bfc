"""A way to split records among clients: apply it, name its clients, describe its result.

Each way is a file beside this one, whose function takes its keys and returns a Split.
"""

import hashlib
import json
import re
import statistics
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.core.errors import JobError
from weft.core.keys import number
from weft.data.formats import shown
from weft.data.records import Record

Assignment = dict[str, list[int]]  # client -> sorted places in the list of records

MATRIX_CLIENTS = 64  # up to so many clients the manifest holds each pair's distance
COMPARED_CLIENTS = 1000  # of more, so many are compared: pairs grow with the square


@dataclass(frozen=True)
class Split:
    """A way to split: `assign(records, seed)` gives each client's records, each record to one client.

    `column` is the natural column that made the clients, by which test records are divided as well.
    """

    assign: Callable[[Sequence[Record], int], Assignment]
    column: str | None = None


# --- making an assignment


def seed32(seed: int, *address: str | int) -> int:
    """Return a seed for libraries that take 32 bits."""
    return number(seed, "split", *address) % 2**32


def assemble(groups: Sequence[Iterable[int]], remedy: str) -> Assignment:
    """Name groups client-0, client-1, ... (zero-padded) and sort each; `remedy` ends an empty one's error.

    >>> assemble([[2, 0], [1]], "Lower clients.")
    {'client-0': [0, 2], 'client-1': [1]}
    """
    width = len(str(len(groups) - 1))
    named = {f"client-{place:0{width}d}": sorted(group) for place, group in enumerate(groups)}
    for client, places in named.items():
        if not places:
            total = sum(len(group) for group in named.values())
            raise JobError(f"data.split: {client} gets none of the {total} records. {remedy}")
    return named


def column_values(records: Sequence[Record], column: str, key: str) -> list[str]:
    """Return a column as text; raise JobError, naming the job's `key`, when a record lacks it."""
    values = [record.get(column) for record in records]
    for place, value in enumerate(values, start=1):
        if value is None or not isinstance(value, str | int | float):
            found = shown(sorted({name for record in records[:100] for name in record}))
            raise JobError(
                f"{key}: record {place} has no text or number in the column {column!r}. "
                f"Columns found: {found}. Name another column, or fill it in each record."
            )
    return [str(value) for value in values]


def codes(values: Sequence[str]) -> list[int]:
    """Return each value's place among the distinct values in natural order.

    >>> codes(["10", "2", "10"])
    [1, 0, 1]
    """
    order = {value: place for place, value in enumerate(sorted(set(values), key=natural))}
    return [order[value] for value in values]


def natural(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a key that sorts numbers in text by size.

    >>> sorted(["client-10", "client-2"], key=natural)
    ['client-2', 'client-10']
    """
    parts = [part.lstrip("0") if part[0] in "0123456789" else part for part in re.findall(r"[0-9]+|[^0-9]+", text)]
    return [(0, len(part), part) if not part or part.isdecimal() else (1, 0, part) for part in parts], text


def client_name(value: object) -> str:
    """Return the name of the client that a column's value makes: safe as a file name and in a job.

    >>> client_name("Clinique de Besançon / Nord")
    'Clinique-de-Besancon-Nord'
    """
    plain = unicodedata.normalize("NFKD", str(value)).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:64].rstrip("-")
    if not name:
        raise JobError(
            "data.split: a value of the column has no letter A-Z or digit to name a client by. "
            "Add a column with plain names."
        )
    return name


def group_by(records: Sequence[Record], column: str, key: str) -> Assignment:
    """Group records by a column's value, under the client names of the values, in natural order."""
    groups: dict[str, list[int]] = {}
    value_of: dict[str, str] = {}
    for place, value in enumerate(column_values(records, column, key)):
        name = client_name(value)
        if value_of.setdefault(name, value) != value:
            raise JobError(
                f"{key}: two values of the column {column!r} give one client name, {name!r}. "
                "Make them differ in letters A-Z or digits within 64 characters."
            )
        groups.setdefault(name, []).append(place)
    return {name: groups[name] for name in sorted(groups, key=natural)}


def divide_test(split: Split, records: Sequence[Record], clients: Iterable[str]) -> Assignment:
    """Divide test records by the split's natural column, known clients first; without one, all are one group.

    A value that is no client's makes a group under its own name; a client without test records has no group.
    """
    if split.column is None:
        return {"all": list(range(len(records)))}
    groups = group_by(records, split.column, "data.test")
    known = {client: groups[client] for client in clients if client in groups}
    return known | groups


# --- describing an assignment


def manifest(
    assignment: Mapping[str, Sequence[int]],
    records: Sequence[Record],
    *,
    column: str | None = None,
    seed: int,
) -> dict[str, Any]:
    """Describe who got what, as values that JSON can hold.

    Counts are over `label` where records have it, else over `column`, else over topics of the text. Distances
    are Jensen-Shannon (base 2) between two clients' shares: 0 when equal, 1 when they have nothing in common; of many
    clients, between those at even places, whose number is given.
    """
    kind, values = _classes(records, column, seed)
    classes = sorted(set(values), key=natural)
    rank = {value: place for place, value in enumerate(classes)}
    histograms = {name: Counter(values[place] for place in places) for name, places in assignment.items()}
    sizes = [len(places) for places in assignment.values()]
    compared = list(histograms.values())[:: -(-len(histograms) // COMPARED_CLIENTS)]
    return {
        "clients": {
            name: {
                "size": len(places),
                "histogram": dict(sorted(histograms[name].items(), key=lambda item: rank[item[0]])),
                "records": list(places),
            }
            for name, places in assignment.items()
        },
        "kind": kind,
        "classes": classes,
        "jensen_shannon": distances([[histogram[value] for value in classes] for histogram in compared])
        | ({"clients": len(compared)} if len(compared) < len(assignment) else {}),
        "sizes": {"min": min(sizes), "median": statistics.median(sizes), "max": max(sizes)},
        "sha256": digest(assignment),
    }


def digest(assignment: Mapping[str, Sequence[int]]) -> str:
    """Return the hash that two equal assignments share."""
    text = json.dumps({name: list(places) for name, places in assignment.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _classes(records: Sequence[Record], column: str | None, seed: int) -> tuple[str, list[str]]:
    if all("label" in record for record in records):
        return "label", column_values(records, "label", "data")
    if column is not None:
        return "column", column_values(records, column, "data")
    from weft.data.topic import topics_of

    try:
        found = topics_of(records, topics=min(10, len(records)), seed=seed)
    except JobError:  # a text without words has no topic, which is no reason to refuse a run
        return "none", ["all"] * len(records)
    return "topic", [f"topic-{topic}" for topic in found]


def distances(counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return mean, max and, for few clients, the matrix of distances between rows (clients, classes).

    >>> distances([[3, 0], [0, 5], [1, 0]])["matrix"]
    [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    import numpy as np
    from scipy.spatial.distance import jensenshannon

    table = np.asarray(counts, dtype=float)
    matrix = np.zeros((len(table), len(table)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a distance of 0 may be the root of -1e-17
        for row in range(len(table) - 1):
            found = jensenshannon(table[row][None], table[row + 1 :], base=2, axis=1)
            matrix[row, row + 1 :] = matrix[row + 1 :, row] = np.nan_to_num(found)
    pairs = matrix[np.triu_indices(len(table), k=1)]
    told = {"mean": float(pairs.mean()), "max": float(pairs.max())} if len(pairs) else {"mean": 0.0, "max": 0.0}
    detail = {"matrix": matrix.round(6).tolist()} if len(table) <= MATRIX_CLIENTS else {}
    return {name: round(value, 6) for name, value in told.items()} | detail
