"""Reading records: what is accepted, and that each bad input gets one clear sentence without record text."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weft.core.errors import JobError
from weft.data import formats
from weft.data.records import Table, read

NEEDS = [["question", "answer"], ["instruction", "output"], ["messages"], ["text"]]
SECRET = "Mr Pemberton has gout"
GOOD = json.dumps({"question": SECRET, "answer": SECRET}).encode()


def table(folder: Path, name: str, content: bytes, **keys: Any) -> Table:
    (folder / name).write_bytes(content)
    return read(name, **{"folder": folder, "needs": NEEDS} | keys)


def refusal(folder: Path, name: str, content: bytes | None = None, **keys: Any) -> str:
    """Return the sentence that refuses a file, having checked what every refusal must be."""
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(JobError) as caught:
        read(name, **{"folder": folder, "needs": NEEDS} | keys)
    sentence = str(caught.value)
    assert sentence.startswith(name)
    assert sentence.endswith((".", "?", ")"))
    assert "\n" not in sentence
    assert not re.search("Pemberton|gout", sentence)
    assert caught.value.__cause__ is None
    return sentence


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


# --- what is accepted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", GOOD + b"\n" + GOOD + b"\n"),
        ("no_last_newline.jsonl", GOOD + b"\n" + GOOD),
        ("blank_lines.jsonl", b"\n" + GOOD + b"\n \n\n" + GOOD + b"\n\n"),
        ("crlf.jsonl", GOOD + b"\r\n" + GOOD + b"\r\n"),
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD),
        ("a.jsonl.gz", gzip.compress(GOOD + b"\n" + GOOD, mtime=0)),
        ("a.json", b"[" + GOOD + b",\n" + GOOD + b"]"),
        ("bom.json", b"\xef\xbb\xbf[" + GOOD + b"," + GOOD + b"]"),
        ("a.csv", f"question,answer\n{SECRET},{SECRET}\n\n{SECRET},{SECRET}\n".encode()),
        ("crlf.csv", f"\ufeffquestion,answer\r\n{SECRET},{SECRET}\r\n{SECRET},{SECRET}".encode()),
        ("a.csv.gz", gzip.compress(f"question,answer\n{SECRET},{SECRET}\n{SECRET},{SECRET}\n".encode(), mtime=0)),
        ("a.parquet", parquet([{"question": SECRET, "answer": SECRET}] * 2)),
    ],
)
def test_every_format_gives_the_same_two_records(tmp_path: Path, name: str, content: bytes) -> None:
    found = table(tmp_path, name, content)
    assert found.records == [{"question": SECRET, "answer": SECRET}] * 2
    assert (found.source, found.skipped, found.bad) == (name, 0, ())


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    """SHA-256 of the nine bytes `{"a": 1}` and a newline, as `sha256sum` prints it."""
    found = table(tmp_path, "a.jsonl", b'{"a": 1}\n', needs=[])
    assert found.sha256 == "e8c628edc9968ef0c668f54e0ba2636b35503357eb1aca0ddc828aeace432f67"


def test_columns_rename_and_keep_the_rest(tmp_path: Path) -> None:
    found = table(tmp_path, "a.jsonl", b'{"q": "a", "a": "b", "site": 3}', columns={"question": "q", "answer": "a"})
    assert found.records == [{"question": "a", "answer": "b", "site": 3}]


def test_columns_may_swap_names(tmp_path: Path) -> None:
    columns = {"question": "answer", "answer": "question"}
    found = table(tmp_path, "a.jsonl", b'{"question": "a", "answer": "b"}', columns=columns)
    assert found.records == [{"question": "b", "answer": "a"}]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    found = table(tmp_path, "a.jsonl", GOOD + b"\n" + GOOD + b"\nbroken", limit=2)
    assert len(found.records) == 2


def test_long_cells_and_line_breaks_in_csv(tmp_path: Path) -> None:
    long = "word " * 40_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["two\nlines", "x"], [long, "y"]])
    found = read("a.csv", folder=tmp_path, needs=[["text", "label"]])
    assert [record["text"] for record in found.records] == ["two\nlines", long]


def test_any_complete_alternative_will_do(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": chat}, {"text": "a", "question": ""}, {"instruction": "a", "output": "b"}]
    found = table(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert found.records == rows


@pytest.mark.parametrize("label", ["3", '"refund"'])
def test_a_label_is_a_number_or_a_name(tmp_path: Path, label: str) -> None:
    content = f'{{"text": "a", "label": {label}}}'.encode()
    assert table(tmp_path, "a.jsonl", content, needs=[["text", "label"]]).records[0]["label"] == json.loads(label)


# --- bad records: line 2 of three

BAD_LINES = {
    "not json": (b'{"question": "' + SECRET.encode() + b'"', "is not JSON (Expecting ',' delimiter, column"),
    "two values": (GOOD + GOOD, "is not JSON (Extra data, column"),
    "bad escape": (rb'{"text": "gout \q"}', "is not JSON (Invalid"),
    "control": (b'{"text": "Pemberton\x01"}', "is not JSON (Invalid control character at, column"),
    "a list": (b'["' + SECRET.encode() + b'"]', "is not an object with named columns but a list"),
    "text": (b'"' + SECRET.encode() + b'"', "is not an object with named columns but text"),
    "null": (b"null", "is not an object with named columns but null"),
    "twice": (b'{"text": "a", "text": "gout"}', "has the key text twice"),
    "twice, a long key": (
        b'{"a gout b": 1, "a gout b": 1, "text": "a"}',
        "the key (a name of 8 characters) twice",
    ),
    "twice, within": (b'{"text": "a", "x": {"b": 1, "b": 2}}', "has the key b twice"),
    "nan": (b'{"text": "a", "score": NaN}', "holds NaN, which is no JSON number"),
    "infinity": (b'{"text": "a", "score": -Infinity}', "holds -Infinity, which is no JSON number"),
    "too large": (b'{"text": "a", "score": 1e999}', "holds a number too large"),
    "too many digits": (b'{"text": "a", "score": ' + b"1" * 5000 + b"}", "a number too long"),
    "too deep": (b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deep"),
    "missing": (b'{"question": "gout"}', "the column 'answer' is missing"),
    "none of them": (b'{"gout": "gout"}', "has none of the columns question with answer"),
    "empty": (b'{"question": "gout", "answer": ""}', "the column 'answer' is empty"),
    "only spaces": (b'{"question": "gout", "answer": " \\n"}', "the column 'answer' is empty"),
    "null column": (b'{"question": null, "answer": "gout"}', "the column 'question' is null"),
    "a number": (b'{"question": "gout", "answer": 3}', "the column 'answer' is not text but a number"),
    "a list in it": (b'{"question": "gout", "answer": ["gout"]}', "the column 'answer' is not text but a l"),
    "raw nul": (b'{"text": "gout\0"}', "holds a NUL byte"),
    "escaped nul": (b'{"text": "gout\\u0000"}', "holds a NUL character"),
    "latin-1": ('{"text": "Pemberton é"}'.encode("latin-1"), "is not valid UTF-8 (byte 21 of the line)"),
    "half a pair": (b'{"text": "gout \\ud83d"}', "holds text that is not valid UTF-8"),
    "no messages": (b'{"messages": []}', "'messages' is not a list with at least one message"),
    "role": (b'{"messages": [{"role": "gout", "content": "a"}]}', "message 1 of 'messages' has no role"),
    "role is a list": (
        b'{"messages": [{"role": ["gout"], "content": "a"}]}',
        "message 1 of 'messages' has no role",
    ),
    "content": (b'{"messages": [{"role": "user", "content": 1}]}', "message 1 of 'messages' has no text"),
    "no answer": (b'{"messages": [{"role": "user", "content": "gout"}]}', "has no answer of the assistant"),
    "too long": (b'{"text": "' + b"gout" * 2_500_000 + b'"}', "is longer than 10,000,000 bytes"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_by_place_and_reason(
    tmp_path: Path, case: str, record_property: Callable[[str, object], None]
) -> None:
    line, reason = BAD_LINES[case]
    sentence = refusal(tmp_path, "train.jsonl", b"\n".join([GOOD, line, GOOD]))
    record_property("said", sentence)
    assert sentence.startswith("train.jsonl:2: ")
    assert reason in sentence
    assert sentence.endswith("Correct it, or set data.on_bad_record: skip.")


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_skipped_alone(tmp_path: Path, case: str) -> None:
    line, reason = BAD_LINES[case]
    content = b"\n".join([GOOD, line, GOOD])
    found = table(tmp_path, "train.jsonl", content, on_bad_record="skip", bad_record_cap=0.5)
    assert (len(found.records), found.skipped) == (2, 1)
    assert found.bad[0].startswith("line 2: ")
    assert reason in found.bad[0]


@pytest.mark.parametrize("label", ["null", "true", '""', "1.5", "[1]"])
def test_a_label_that_is_none(tmp_path: Path, label: str) -> None:
    content = f'{{"text": "gout", "label": {label}}}'.encode()
    assert "a.jsonl:1: the column 'label' is" in refusal(tmp_path, "a.jsonl", content, needs=[["text", "label"]])


def test_record_numbers_where_there_are_no_lines(tmp_path: Path) -> None:
    rows = [{"text": "gout"}, {"text": None}]
    assert refusal(tmp_path, "a.parquet", parquet(rows)).startswith("a.parquet, record 2: the column 'text' is null.")
    assert refusal(tmp_path, "a.json", b'[{"text": "gout"}, 5]').startswith("a.json, record 2: is not an object")


def test_csv_places_count_lines_and_not_records(tmp_path: Path) -> None:
    content = b'question,answer\n"gout\n\ngout",b\n\na,\n'
    assert refusal(tmp_path, "a.csv", content).startswith("a.csv:6: the column 'answer' is empty.")


BAD_ROWS = {
    "cells": (b"gout", "has 1 cells where the header has 2"),
    "latin-1": (b"gout \xe9,b", "holds text that is not valid UTF-8"),
    "nul": (b"gout\0,b", "holds a NUL character"),
    "empty": (b'gout," "', "the column 'answer' is empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_of_csv(tmp_path: Path, case: str) -> None:
    row, reason = BAD_ROWS[case]
    content = b"question,answer\na,b\n" + row + b"\nc,d\n"
    assert refusal(tmp_path, "a.csv", content).startswith(f"a.csv:3: {reason}")
    found = table(tmp_path, "a.csv", content, on_bad_record="skip", bad_record_cap=0.5)
    assert [record["question"] for record in found.records] == ["a", "c"]
    assert found.bad == (f"line 3: {reason}",)


# --- the cap


def test_skipping_up_to_the_cap(tmp_path: Path) -> None:
    """Two bad of 100 are 0.02 of all: a cap of 0.02 lets them pass, 0.019 does not."""
    content = b"\n".join([b"{", GOOD, b"[]", *[GOOD] * 97])
    found = table(tmp_path, "a.jsonl", content, on_bad_record="skip", bad_record_cap=0.02)
    assert (len(found.records), found.skipped) == (98, 2)
    assert [text.split(":")[0] for text in found.bad] == ["line 1", "line 3"]
    sentence = refusal(tmp_path, "a.jsonl", on_bad_record="skip", bad_record_cap=0.019)
    for part in ("2 of 100 records are bad", "(0.019)", "line 1: is not JSON"):
        assert part in sentence


def test_at_most_twenty_reasons_are_kept(tmp_path: Path) -> None:
    found = table(tmp_path, "a.jsonl", b"[]\n" * 30 + GOOD, on_bad_record="skip", bad_record_cap=1.0)
    assert (found.skipped, len(found.bad)) == (30, 20)


def test_all_bad_is_refused_at_any_cap(tmp_path: Path) -> None:
    assert "3 of 3" in refusal(tmp_path, "a.jsonl", b"[]\n" * 3, on_bad_record="skip", bad_record_cap=1.0)


# --- bad files

BAD_FILES = {
    "empty": ("train.jsonl", b"", "is an empty file"),
    "blank": ("train.jsonl", b"\n\r\n \n", "holds no record"),
    "empty list": ("train.json", b"[]", "holds no record"),
    "only a header": ("train.csv", b"text,label\n", "holds no record"),
    "lfs": ("train.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "lfs parquet": ("train.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not gzip": ("train.jsonl.gz", GOOD, "is not a whole gzip file"),
    "half gzip": ("train.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:60], "is not a whole gzip file"),
    "gzip in disguise": ("train.jsonl", gzip.compress(GOOD, mtime=0), "Rename it to train.jsonl.gz"),
    "utf-16": ("train.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16"),
    "not a list": ("train.json", GOOD, "holds an object and not a list of records"),
    "lines in json": ("train.json", GOOD + b"\n" + GOOD, "is not JSON (Extra data, line 2, column 1)"),
    "latin-1 json": ("train.json", '["Pemberton é"]'.encode("latin-1"), "is not valid UTF-8 (byte 13"),
    "not parquet": ("train.parquet", GOOD * 9, "is not a whole Parquet file"),
    "half parquet": ("train.parquet", parquet([{"text": SECRET}])[:99], "is not a whole Parquet file"),
    "unsupported": ("train.txt", GOOD, "Weft reads .jsonl"),
    "no suffix": ("train", GOOD, "Weft reads .jsonl"),
    "csv quote": ("train.csv", b'text,label\na,b\n"gout,c\nd,e\n', "train.csv:3: is not CSV (unexpected end"),
    "csv after quote": ("train.csv", b'text\n"gout"x\n', "train.csv:2: is not CSV"),
    "csv header twice": ("train.csv", b"text,text\na,b\n", "train.csv:1: the header has an empty"),
    "csv line": ("train.csv", b"text\na\n" + b"gout" * 2_600_000, "train.csv:3: is longer than"),
    "csv, no header": (
        "train.csv",
        f"{SECRET},b\nc,d\n".encode(),
        "Columns found: (a name of 21 characters), b",
    ),
    "columns": ("train.jsonl", b'{"q": "gout", "a": "gout"}', "Columns found: q, a. Say which is which"),
    "semicolons": ("train.csv", b"question;answer\na;b\n", "Columns found: (a name of 15 characters)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_a_bad_file_is_refused_whatever_the_policy(tmp_path: Path, case: str, policy: str) -> None:
    name, content, reason = BAD_FILES[case]
    assert reason in refusal(tmp_path, name, content, on_bad_record=policy)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "data").mkdir()
    assert "is a folder" in refusal(tmp_path, "data")
    assert refusal(tmp_path, "trian.jsonl").endswith("Did you mean train.jsonl?")
    assert "there is no such file" in refusal(tmp_path, "quite_other.csv")
    assert "the folder" in refusal(tmp_path, "date/train.jsonl")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jsonl").write_bytes(GOOD)
    monkeypatch.setattr(Path, "open", deny)
    assert "cannot be read (Permission denied)" in refusal(tmp_path, "a.jsonl")


def test_a_mapping_to_a_column_that_is_not_there(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, "a.jsonl", b'{"q": "gout"}', columns={"text": "body"})
    assert "maps 'text' to 'body'" in sentence
    assert "Columns found: q." in sentence


def test_a_column_missing_in_some_records_is_their_fault(tmp_path: Path) -> None:
    """Negative control of "no record has the columns": one record has them, so the other is named."""
    assert refusal(tmp_path, "a.jsonl", b'{"q": "gout"}\n' + GOOD).startswith("a.jsonl:1: has none of the columns")


# --- datasets of the hub


def pretend_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name.v2:small#test[:10]", ("org/name.v2", "small", "test[:10]")),
        ("org/name#validation", ("org/name", None, "validation")),
    ],
)
def test_a_dataset_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[Any, ...]
) -> None:
    import datasets

    calls = pretend_hub(monkeypatch, datasets.Dataset.from_dict({"text": ["a", "b"]}))
    found = read(source, folder=tmp_path, needs=NEEDS)
    assert found.records == [{"text": "a"}, {"text": "b"}]
    assert calls == [asked]
    assert re.fullmatch("[0-9a-f]{64}", found.sha256)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError(SECRET), "did not load from the hub (ConnectionError)"),
        (RuntimeError(SECRET), "did not load from the hub (RuntimeError)"),
        (
            ValueError("Unknown split \"train\". Should be one of ['test']."),
            "no such configuration or split (Unknown",
        ),
    ],
)
def test_a_hub_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    pretend_hub(monkeypatch, error)
    assert reason in refusal(tmp_path, "org/name")


def test_a_dataset_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    pretend_hub(monkeypatch, datasets.exceptions.DatasetNotFoundError("x"))
    assert "no such dataset on the hub" in refusal(tmp_path, "org/name")


def test_a_file_name_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend_hub(monkeypatch, SimpleNamespace())
    for name in ("data/train.jsonl", "data/train.txt", "data/train.zip"):
        refusal(tmp_path, name)
    assert asked == []


def test_the_leak_check_would_catch_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a reader that quotes the value must fail the check that every test above runs."""
    monkeypatch.setattr(formats, "kind", lambda value: f"{value!r}")
    monkeypatch.setattr(formats, "_as_record", lambda value: f"is {value!r}")
    with pytest.raises(AssertionError):
        refusal(tmp_path, "a.jsonl", b'["gout"]')
