"""Formats: find a source of records, and yield its rows with their places, one function per format.

No error of this file holds text of a record: data may be private, and errors travel in logs and reports.
"""

import csv
import difflib
import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

from weft.core.errors import JobError

Record = dict[str, Any]
Row = tuple[int, Record | str]  # a place (line or record number from 1), and the record or why it is bad

MAX_LINE = 10_000_000  # bytes
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".json", ".parquet")
# Names of other data formats: `org/name.txt` is a mistaken file, whereas `org/name.v2` may be a dataset.
_FOREIGN = re.compile(r"\.(txt|tsv|xlsx?|ods|zip|gz|bz2|xz|zst|tar|arrow|pkl|pt|npz|npy|ndjson|ya?ml|xml|md)$")
_HUB = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?(?:#([\w.\[\]:%+-]+))?")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Opened:
    """A source that was found: its rows are read when iterated."""

    name: str
    rows: Iterator[Row]
    sha256: str  # of the file's bytes, or of the dataset's fingerprint
    unit: Literal["line", "record"]

    def at(self, place: int) -> str:
        """Name a place in the source, as an error does."""
        return f"{self.name}:{place}" if self.unit == "line" else f"{self.name}, record {place}"


@dataclass(frozen=True)
class Flaw:
    """Stands in a parsed value where JSON allowed what a record may not hold."""

    reason: str


def kind(value: Any) -> str:
    """Say what a value is, without the value.

    >>> kind([1, 2])
    'a list'
    """
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def shown(names: Sequence[str]) -> str:
    """List names of columns; the "header" of a CSV without one is a record, so only plain names are shown.

    >>> shown(["question", "I have had this pain since May."])
    'question, (a name of 31 characters)'
    """
    plain = [name if _PLAIN_NAME.fullmatch(name) else f"(a name of {len(name)} characters)" for name in names]
    return ", ".join(plain[:20]) + (f" and {len(plain) - 20} more" if len(plain) > 20 else "")


def open_source(source: str, folder: Path) -> Opened:
    """Find a file, its path counted from `folder`, or a dataset `org/name:config#split`; refuse all else."""
    path = folder / source
    match = None if source.endswith(SUFFIXES) or _FOREIGN.search(source) else _HUB.fullmatch(source)
    if match is not None and not path.exists():
        return _open_dataset(source, *match.groups())
    _check_file(source, path)
    with _reading(source, path) as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        handle.seek(0)
        _check_head(source, handle.read(64))
    unit: Literal["line", "record"] = "record" if source.endswith((".json", ".parquet")) else "line"
    return Opened(source, _file_rows(source, path), digest, unit)


def _check_file(source: str, path: Path) -> None:
    if path.is_dir():
        raise JobError(f"{source}: is a folder. Give the file in it ({', '.join(SUFFIXES)}).")
    if not source.endswith(SUFFIXES):
        raise JobError(f"{source}: Weft reads {', '.join(SUFFIXES)}, or a dataset named `org/name`. Convert the file.")
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise JobError(f"{source}: the folder {path.parent} does not exist. Paths count from the job file's folder.")
    near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.iterdir()), n=1)
    hint = f"Did you mean {near[0]}?" if near else "Paths count from the job file's folder."
    raise JobError(f"{source}: there is no such file in {path.parent}. {hint}")


def _reading(source: str, path: Path) -> BufferedIOBase:
    try:
        return path.open("rb")
    except OSError as error:
        raise JobError(f"{source}: cannot be read ({error.strerror}). Check its permissions.") from None


def _check_head(source: str, head: bytes) -> None:
    """Refuse what the suffix hides: a pointer, another compression, another encoding."""
    if not head:
        raise JobError(f"{source}: is an empty file. Give a file with at least one record.")
    if head.startswith(b"version https://git-lfs"):
        raise JobError(f"{source}: is a Git LFS pointer and not the data itself. Run `git lfs pull`.")
    if head.startswith(b"\x1f\x8b") and not source.endswith(".gz"):
        raise JobError(f"{source}: is compressed by gzip. Rename it to {source}.gz.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise JobError(f"{source}: is UTF-16. Save it as UTF-8.")


def _file_rows(source: str, path: Path) -> Iterator[Row]:
    """Yield the rows of a file, turning every way a file can break under the reader into a JobError."""
    name = source.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(source, path)
            return
        with gzip.open(path, "rb") if name != source else path.open("rb") as handle:
            if name.endswith(".jsonl"):
                yield from _jsonl(handle)
            elif name.endswith(".csv"):
                yield from _csv(source, handle)
            else:
                yield from _json_list(source, handle.read())
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise JobError(f"{source}: is not a whole gzip file. Copy or download it again.") from None
    except OSError as error:
        raise JobError(f"{source}: cannot be read ({error.strerror or 'damaged'}). Copy it again.") from None


# --- formats


def _lines(handle: BufferedIOBase) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number from 1, without its end; None for a line that is too long."""
    number = 0
    while raw := handle.readline(MAX_LINE + 2):
        number += 1
        too_long = len(raw) > MAX_LINE and not raw.endswith(b"\n")
        while too_long and raw and not raw.endswith(b"\n"):
            raw = handle.readline(MAX_LINE)
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that Windows programs write
        yield number, None if too_long else raw.rstrip(b"\r\n")


def _jsonl(handle: BufferedIOBase) -> Iterator[Row]:
    for number, raw in _lines(handle):
        if raw is None:
            yield number, f"is longer than {MAX_LINE:,} bytes"
        elif raw.strip():
            yield number, _json_record(raw)


def _json_record(raw: bytes) -> Record | str:
    if b"\0" in raw:
        return "holds a NUL byte"
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return f"is not valid UTF-8 (byte {error.start + 1} of the line)"
    return _as_record(_parse(text))


def _as_record(value: Any) -> Record | str:
    if isinstance(value, Flaw):
        return value.reason
    return value if isinstance(value, dict) else f"is not an object with named columns but {kind(value)}"


def _parse(text: str) -> Any:
    """Return the value of a JSON text, a Flaw when there is none; no exception may carry the text away."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        return Flaw(f"is not JSON ({error.msg.split(':')[0]}, {where})")
    except (ValueError, RecursionError):
        return Flaw("is not JSON that can be read (a number too long, or nested too deep)")


def _object(pairs: list[tuple[str, Any]]) -> Record | Flaw:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return Flaw(f"has the key {shown([twice])} twice")


def _float(text: str) -> float | Flaw:
    value = float(text)
    return value if math.isfinite(value) else Flaw("holds a number too large")


def _constant(name: str) -> Flaw:
    return Flaw(f"holds {name}, which is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def _json_list(source: str, raw: bytes) -> Iterator[Row]:
    try:
        value = _parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        value = Flaw(f"is not valid UTF-8 (byte {error.start + 1} of the file)")
    if not isinstance(value, list):
        reason = value.reason if isinstance(value, Flaw) else f"holds {kind(value)} and not a list of records"
        raise JobError(f"{source}: {reason}. If it has one record a line, rename it to .jsonl.")
    for number, item in enumerate(value, start=1):
        yield number, _as_record(item)


def _csv(source: str, handle: BufferedIOBase) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)  # its own limit, 131,072 characters, refuses long documents
    reader = csv.reader(_csv_text(source, handle), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                if header is None:
                    header = _checked_header(source, cells)
                elif len(cells) != len(header):
                    yield start, f"has {len(cells)} cells where the header has {len(header)}"
                else:
                    yield start, dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        # Never skipped: a quote left open swallows the good records after it.
        raise JobError(f"{source}:{start}: is not CSV ({error}). Check the quotes from that line on.") from None


def _csv_text(source: str, handle: BufferedIOBase) -> Iterator[str]:
    for number, raw in _lines(handle):
        if raw is None:
            raise JobError(f"{source}:{number}: is longer than {MAX_LINE:,} bytes. Remove or shorten it.")
        # Bytes that are not UTF-8 become surrogates, which the check of the record then refuses.
        yield raw.decode(errors="surrogateescape") + "\n"


def _checked_header(source: str, cells: list[str]) -> list[str]:
    if len(set(cells)) < len(cells) or "" in cells:
        raise JobError(f"{source}:1: the header has an empty or a repeated name. Name each column once.")
    return cells


def _parquet(source: str, path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError):
        raise JobError(f"{source}: is not a whole Parquet file. Copy or write it again.") from None


def _open_dataset(source: str, name: str, config: str | None, split: str | None) -> Opened:
    dataset = _load_dataset(source, name, config, split or "train")
    digest = hashlib.sha256(str(dataset._fingerprint).encode()).hexdigest()
    return Opened(source, enumerate(dataset, start=1), digest, "record")


def _load_dataset(source: str, name: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetNotFoundError:
        reason = "there is no such file beside the job, and no such dataset on the hub that is open to you"
    except ValueError as error:
        reason = f"the dataset has no such configuration or split ({str(error).splitlines()[0][:200]})"
    except Exception as error:  # any of the hub's, the network's and the format's own errors
        reason = f"there is no such file, and the dataset did not load from the hub ({type(error).__name__})"
    raise JobError(f"{source}: {reason}. Check the name and the network, or give a file ({', '.join(SUFFIXES)}).")
