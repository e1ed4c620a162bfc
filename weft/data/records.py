"""Records: read from a file or a Hugging Face dataset, checked one by one, never guessed at.

No error of this file holds text of a record: data may be private, and errors travel in logs and reports.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from weft.core.errors import JobError
from weft.data.formats import Flaw, Opened, Record, Row, kind, open_source, shown
from weft.data.pictures import decoded, located, pillow

__all__ = ["Record", "Table", "read"]

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Table:
    """The good records of one source, in its order, and what was left out."""

    records: list[Record]
    source: str
    skipped: int
    bad: tuple[str, ...]  # the first 20, as "line 7: reason"
    sha256: str  # of the file's bytes and its pictures', or of the dataset's fingerprint


def read(
    source: str,
    *,
    folder: Path,
    columns: Mapping[str, str] | None = None,
    on_bad_record: Literal["refuse", "skip"] = "refuse",
    bad_record_cap: float = 0.01,
    limit: int | None = None,
    needs: Sequence[Sequence[str]] = (),
) -> Table:
    """Read the records of a file beside the job, or of a dataset `org/name:config#split`.

    `columns` maps standard names to the source's own. `needs` lists alternative sets of columns, one of which
    each record must have complete. `limit` reads only the first so many records, good or bad. With "skip",
    bad records are counted and left out, up to `bad_record_cap` as a share of all. Where `needs` has an `image`,
    it is a path counted from the file's folder, and becomes the whole path of a picture that decodes. Raises JobError.
    """
    opened = open_source(source, folder)
    rows = list(islice(opened.rows, limit))
    if not rows:
        raise JobError(f"{source}: holds no record. Give a file with at least one record.")
    _check_mapping(source, rows, columns or {})
    rows = [(place, row if isinstance(row, str) else _rename(row, columns or {})) for place, row in rows]
    _check_needs(source, rows, needs)
    pictures = _folder_of_pictures(source, folder) if any("image" in columns for columns in needs) else None
    records, bad = _sieve(rows, needs, pictures)
    if bad:
        _apply_policy(opened, bad, len(rows), None if on_bad_record == "refuse" else bad_record_cap)
    reasons = tuple(f"{opened.unit} {place}: {reason}" for place, reason in bad[:20])
    return Table(records, source, len(bad), reasons, opened.sha256 if pictures is None else _seen(opened, records))


def _folder_of_pictures(source: str, folder: Path) -> Path:
    if not (folder / source).is_file():
        raise JobError(f"{source}: pictures are read from files beside a data file. Save the dataset as such files.")
    pillow()
    return (folder / source).parent


def _sieve(
    rows: Iterable[Row], needs: Sequence[Sequence[str]], pictures: Path | None
) -> tuple[list[Record], list[tuple[int, str]]]:
    records: list[Record] = []
    bad: list[tuple[int, str]] = []
    for place, row in rows:
        if isinstance(row, str):
            bad.append((place, row))
        elif (reason := _flaw(row) or _lack(row, needs) or _unseen(row, pictures)) is not None:
            bad.append((place, reason))
        else:
            records.append(row)
    return records, bad


def _apply_policy(opened: Opened, bad: list[tuple[int, str]], total: int, cap: float | None) -> None:
    """Raise unless so many bad records may be skipped; `cap` None means none may."""
    if cap is None:
        place, reason = bad[0]
        raise JobError(f"{opened.at(place)}: {reason}. Correct it, or set data.on_bad_record: skip.")
    if len(bad) > cap * total or len(bad) == total:
        first = "; ".join(f"{opened.unit} {place}: {reason}" for place, reason in bad[:3])
        raise JobError(
            f"{opened.name}: {len(bad)} of {total} records are bad, more than data.bad_record_cap ({cap:g}) "
            f"lets skip. First: {first}. Correct them, or raise the cap."
        )


# --- columns


def _rename(record: Record, columns: Mapping[str, str]) -> Record:
    taken = set(columns.values())
    renamed = {new: record[old] for new, old in columns.items() if old in record}
    return {name: value for name, value in record.items() if name not in taken} | renamed


def _names(rows: Iterable[Row]) -> list[str]:
    """Return every column of any record, in order of appearance."""
    return list(dict.fromkeys(name for _, row in rows if not isinstance(row, str) for name in row))


def _check_mapping(source: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    found = _names(rows)
    for new, old in columns.items():
        if found and old not in found:
            raise JobError(
                f"{source}: data.columns maps {new!r} to {old!r}, and no record has a column of that name. "
                f"Columns found: {shown(found)}. Correct data.columns."
            )


def _check_needs(source: str, rows: Sequence[Row], needs: Sequence[Sequence[str]]) -> None:
    found = _names(rows)
    if needs and found and not any(set(columns) <= set(found) for columns in needs):
        name = next(column for column in needs[0] if column not in found)
        raise JobError(
            f"{source}: no record has the columns that the task needs ({_choices(needs)}). Columns found: "
            f"{shown(found)}. Say which is which with data.columns, as in `columns: {{{name}: its_name}}`."
        )


def _choices(needs: Sequence[Sequence[str]]) -> str:
    return ", or ".join(" with ".join(columns) for columns in needs)


# --- one record


def _flaw(record: Record) -> str | None:
    """Return why no task could use a record, whatever its columns; a loop, since nesting may be deep."""
    stack: list[Any] = [record]
    while stack:
        value = stack.pop()
        if isinstance(value, Flaw):
            return value.reason
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, str):
            if "\0" in value:
                return "holds a NUL character"
            if not value.isascii() and _SURROGATE.search(value):
                return "holds text that is not valid UTF-8"
    return None


def _lack(record: Record, needs: Sequence[Sequence[str]]) -> str | None:
    """Return what is wrong with the most nearly complete alternative, None when one is complete."""
    faults = [[fault for name in columns if (fault := _fault(record, name))] for columns in needs]
    if not needs or not all(faults):
        return None
    present = [_presence(record, columns) for columns in needs]
    if not any(name in record for columns in needs for name in columns):
        return f"has none of the columns {_choices(needs)}"
    return faults[present.index(max(present))][0]


def _unseen(record: Record, pictures: Path | None) -> str | None:
    """Return why a record's picture cannot be seen; else put its whole path in the place of its name."""
    if pictures is None:
        return None
    try:
        path = located(pictures, record["image"])
        decoded(path)
    except JobError as error:
        return str(error)
    record["image"] = str(path)
    return None


def _seen(opened: Opened, records: Sequence[Record]) -> str:
    """Return a hash of a file and of the bytes of all its pictures."""
    digest = hashlib.sha256(opened.sha256.encode())
    for record in records:
        digest.update(hashlib.sha256(Path(record["image"]).read_bytes()).digest())
    return digest.hexdigest()


def _presence(record: Record, columns: Sequence[str]) -> tuple[int, int]:
    filled = sum(record.get(name) is not None for name in columns)
    return filled, sum(name in record for name in columns)


def _fault(record: Record, name: str) -> str | None:
    if name not in record:
        return f"the column {name!r} is missing"
    value = record[name]
    if value is None:
        return f"the column {name!r} is null"
    if name == "messages":
        return _chat_fault(value)
    if name == "label" and isinstance(value, int) and not isinstance(value, bool):
        return None
    if not isinstance(value, str):
        return f"the column {name!r} is not text but {kind(value)}"
    return None if value.strip() else f"the column {name!r} is empty"


def _chat_fault(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "the column 'messages' is not a list with at least one message"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return f"message {number} of 'messages' has no role among {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"message {number} of 'messages' has no text as its content"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "'messages' has no answer of the assistant"
    return None
