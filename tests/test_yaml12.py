"""YAML as people mean it: scalars of YAML 1.2, each key once, and the line of every value."""

import math
from typing import Any

import pytest

from weft.core.errors import JobError
from weft.yaml12 import read

SCALARS: dict[str, Any] = {
    # what YAML 1.1, which PyYAML speaks, reads otherwise
    "1e-4": 1e-4,
    "1E5": 1e5,
    "yes": "yes",
    "no": "no",
    "on": "on",
    "Off": "Off",
    "12:30:00": "12:30:00",
    "2024-01-01": "2024-01-01",
    "010": 10,
    "0x1F": "0x1F",
    "0b11": "0b11",
    # the rest
    "7": 7,
    "-7": -7,
    "+7": 7,
    "1_000": 1000,
    "1.5": 1.5,
    ".5": 0.5,
    "1.": 1.0,
    "-1.5e+3": -1500.0,
    ".inf": math.inf,
    "-.inf": -math.inf,
    "true": True,
    "False": False,
    "TRUE": True,
    "null": None,
    "~": None,
    "": None,
    "'7'": "7",
    '"true"': "true",
    "text": "text",
    "1e": "1e",
    "1.2.3": "1.2.3",
    "-": [None],
    "e5": "e5",
    "inf": "inf",
    "nan": "nan",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars(text: str, value: Any) -> None:
    found = read(f"key: {text}", "job.yaml")[0] if text != "-" else {"key": read(text, "job.yaml")[0]}
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


def test_nan() -> None:
    assert math.isnan(read(".nan", "job.yaml")[0])


def test_a_number_too_long_for_python_is_infinite() -> None:
    """`int` refuses more than 4300 digits by an exception of its own."""
    assert read("9" * 5000, "job.yaml")[0] == math.inf
    assert read("9" * 300, "job.yaml")[0] == int("9" * 300)


def test_a_key_is_a_word_whatever_it_looks_like() -> None:
    assert read("{on: 1, 2: 3, true: 4}", "job.yaml")[0] == {"on": 1, "2": 3, "true": 4}


def test_nothing_is_none() -> None:
    assert read("", "job.yaml") == (None, {})
    assert read("# a comment\n", "job.yaml") == (None, {})


def test_every_value_has_its_line() -> None:
    lines = read("a: 1\n\nb:\n  c: [x,\n      {d: 2}]\n", "job.yaml")[1]
    assert lines == {
        (): 1,
        ("a",): 1,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", 0): 4,
        ("b", "c", 1): 5,
        ("b", "c", 1, "d"): 5,
    }


def test_an_alias_is_its_value() -> None:
    assert read("a: &x {b: 1}\nc: *x\n", "job.yaml")[0] == {"a": {"b": 1}, "c": {"b": 1}}


REFUSED = {
    "a: 1\na: 2": "job.yaml, line 2: `a` stands here a second time (first on line 1)",
    "a: {b: 1, b: 2}": "job.yaml, line 1: `b` stands here a second time (first on line 1)",
    "a:\n\tb: 1": "job.yaml, line 2: this is not YAML: found character '\\t' that cannot start any token; "
    "indent with spaces, not tabs",
    "a: [1": "job.yaml, line 1: this is not YAML: expected ',' or ']', but got '<stream end>'",
    "a: 1\n---\nb: 1": "job.yaml, line 2: this is not YAML: expected a single document in the stream "
    "but found another document",
    "a: 1\nb: \x07": "job.yaml, line 2: this is not YAML: it holds a character that cannot be printed",
    "a: !!python/object/apply:os.system [x]": "job.yaml, line 1: the tag "
    "tag:yaml.org,2002:python/object/apply:os.system is not allowed; write the value plainly",
    "a: !own 1": "job.yaml, line 1: the tag !own is not allowed; write the value plainly",
    "[a]: 1": "job.yaml, line 1: a key must be a word",
    "a: &a [*a]": "job.yaml: a job is small; this has too many or too deeply nested values",
    "[" * 100_000: "job.yaml: a job is small; this has too many or too deeply nested values",
    f"[{'1, ' * 10_001}]": "job.yaml: a job is small; this has too many or too deeply nested values",
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.items(), ids=range(len(REFUSED)))
def test_refused(text: str, sentence: str) -> None:
    with pytest.raises(JobError) as caught:
        read(text, "job.yaml")
    assert str(caught.value) == sentence
