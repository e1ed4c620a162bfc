"""A plug-in is a file and a function; its signature is the schema of its keys."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weft import plugins
from weft.core.errors import JobError, KeyProblem
from weft.explain import explain
from weft.plugins import Choice, build, find, names, parse, schema

EVERY = [(kind, name) for kind in plugins.FOLDERS for name in names(kind)]

OWN = '''
"""mine: a transform of my own."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from weft.core.types import Transform


def mine(
    norm: Annotated[float, Field(gt=0)],
    mode: Literal["flat", "layer"] = "flat",
    parts: tuple[str, ...] = ("a",),
    bounds: dict[str, float] | None = None,
) -> Transform:
    """Do something of my own."""
    return Transform(check=lambda wire: replace(wire, weighted=True), client=lambda at, p: p, server=lambda t, _: t)


def nothing() -> None:
    pass


def anything(*parts: int) -> None:
    pass


def unknown_type(norm: "NoSuchType") -> None:
    pass


constant = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a user's package on the path."""
    (tmp_path / "own_weft").mkdir()
    (tmp_path / "own_weft" / "__init__.py").touch()
    (tmp_path / "own_weft" / "steps.py").write_text(OWN)
    (tmp_path / "own_weft" / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("own_weft")]:
        del sys.modules[name]


# --- Weft's own


def test_every_kind_has_a_plug_in() -> None:
    assert {kind for kind, _ in EVERY} == {"adapter", "task", "algorithm", "transform", "split", "sampler", "pace"}


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_plug_in_is_a_file_and_a_function_of_its_name(kind: str, name: str) -> None:
    function = find(kind, name)
    assert function.__name__ == name
    assert function.__module__ == f"weft.{plugins.FOLDERS[kind]}.{name}"
    assert list(schema(function).model_fields) == list(inspect.signature(function).parameters)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_plug_in_refuses_an_unknown_key(kind: str, name: str) -> None:
    with pytest.raises(KeyProblem, match=r"unknown key|is missing"):
        parse(kind, {name: {"no_such_key": 1}})


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_plug_in_builds_from_its_defaults(kind: str, name: str) -> None:
    fields = schema(find(kind, name)).model_fields
    examples = {"clients": 2, "alpha": 1.0, "column": "site", "norm": 1.0}
    required = {key: examples[key] for key, field in fields.items() if field.is_required() and key in examples}
    if len(required) < sum(field.is_required() for field in fields.values()):
        pytest.skip("needs a key that this test has no value for")
    choice = parse(kind, {name: required})
    assert set(choice.keys) == set(fields)
    assert type(build(choice, kind)).__name__ == kind.capitalize()


# --- parse


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ("weigh", {"by": "examples", "cap": 2**20}),
        ({"weigh": None}, {"by": "examples", "cap": 2**20}),
        ({"weigh": {}}, {"by": "examples", "cap": 2**20}),
        ({"weigh": "uniform"}, {"by": "uniform", "cap": 2**20}),
        ({"weigh": {"cap": 5}}, {"by": "examples", "cap": 5}),
        (Choice("weigh", {"cap": 5}), {"by": "examples", "cap": 5}),
    ],
    ids=["name", "null", "no keys", "scalar for the first key", "keys", "choice"],
)
def test_parse_fills_the_defaults_in(value: Any, keys: dict[str, Any]) -> None:
    assert parse("transform", value) == Choice("weigh", keys)


WRONG: list[tuple[str, Any, str]] = [
    ("transform", 3, "at: name one transform, as `name` or `{name: {key: value}}`"),
    ("transform", {}, "at: name one transform, as `name` or `{name: {key: value}}`"),
    ("transform", {"weigh": {}, "clip": {}}, "at: name one transform, as `name` or `{name: {key: value}}`"),
    ("algorithm", {"fedavg": 3}, "at: `fedavg` takes no keys"),
    ("transform", {"weigh": "exmples"}, "at.weigh.by: must be 'examples' or 'uniform', got 'exmples'"),
    ("transform", {"weigh": {"cap": 0}}, "at.weigh.cap: must be more than 0, got 0"),
    ("transform", {"weigh": {"cap": "5"}}, "at.weigh.cap: must be a whole number, got '5'"),
    ("transform", {"weigh": {"cap": True}}, "at.weigh.cap: must be a whole number, got true"),
    ("transform", {"weigh": {"cap": 5.0}}, "at.weigh.cap: must be a whole number, got 5.0"),
    ("transform", {"weigh": {"cap": [5]}}, "at.weigh.cap: must be a whole number, got a list"),
    ("transform", {"weigh": {"cup": 5}}, "at.weigh.cup: unknown key; did you mean `cap`? (known: by, cap)"),
    ("adapter", {"lora": {"alpha": "x"}}, "at.lora.alpha: must be a number, got 'x'"),
    ("adapter", {"lora": {"alpha": float("inf")}}, "at.lora.alpha: must be a finite number, got inf"),
    ("adapter", {"lora": {"rslora": "yes"}}, "at.lora.rslora: must be true or false, got 'yes'"),
    (
        "adapter",
        {"lora": {"targets": {"a": 1}}},
        "at.lora.targets: must be 'auto' or 'all-linear' or a list, got a mapping",
    ),
    ("adapter", {"lora": {"targets": ["q", 1]}}, "at.lora.targets[1]: must be text, got 1"),
    ("split", "by", "at.by.column: is missing"),
]


@pytest.mark.parametrize(("kind", "value", "sentence"), WRONG)
def test_a_wrong_choice_is_one_sentence_at_its_place(kind: str, value: Any, sentence: str) -> None:
    with pytest.raises(KeyProblem) as caught:
        parse(kind, value, ("at",))
    assert str(caught.value) == sentence


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        JobError, match=r"no adapter `lroa`; did you mean `lora`\? \(known: .*lora.*; your own: package"
    ):
        find("adapter", "lroa")


@pytest.mark.parametrize("name", ["../data/records", "os:system", "records", "lora.lora", "", "Lora"])
def test_a_name_is_no_path_and_no_bare_module(name: str) -> None:
    with pytest.raises(JobError, match="there is no split"):
        find("split", name)


# --- a user's own


@pytest.mark.usefixtures("own")
def test_a_plug_in_of_ones_own() -> None:
    choice = parse("transform", {"own_weft.steps:mine": {"norm": 2, "parts": ["b", "c"]}})
    assert choice.keys == {"norm": 2.0, "mode": "flat", "parts": ["b", "c"], "bounds": None}
    assert parse("transform", choice) == choice
    assert type(build(choice, "transform")).__name__ == "Transform"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own_weft.none:mine", "cannot be imported .ModuleNotFoundError.*PYTHONPATH"),
        ("own_weft.broken:mine", "cannot be imported .ZeroDivisionError: division by zero"),
        ("own_weft.steps:yours", "the module own_weft.steps has no function `yours`"),
        ("own_weft.steps:constant", "is not a function"),
        ("own_weft.steps:anything", "its keys must be named, and it takes .parts"),
        ("own_weft.steps:unknown_type", "NoSuchType"),
    ],
)
def test_a_broken_plug_in_of_ones_own(name: str, reason: str) -> None:
    with pytest.raises(JobError, match=reason):
        parse("transform", name)


@pytest.mark.usefixtures("own")
def test_a_plug_in_of_another_kind() -> None:
    with pytest.raises(JobError, match=r"^transform: `own_weft.steps:nothing` is no transform: it returns NoneType$"):
        build(parse("transform", "own_weft.steps:nothing"), "transform")


# --- explain


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_plug_in_explains_itself_in_words(kind: str, name: str) -> None:
    text = explain(name)
    assert f"{name} ({kind}): weft/{plugins.FOLDERS[kind]}/{name}.py\n" in text
    assert inspect.cleandoc(find(kind, name).__doc__ or "?") in text
    keys = text.split("\nkeys:\n")[-1] if "\nkeys:\n" in text else ""
    assert len(keys.splitlines()) >= len(schema(find(kind, name)).model_fields)
    for ugly in ("typing", "Annotated", "FieldInfo", "Literal", "NoneType", "<class", "list["):
        assert ugly not in keys


def test_the_keys_of_lora() -> None:
    assert explain("lora").split("keys:\n")[1].splitlines()[:5] == [
        "  rank: whole number > 0 (default 8)",
        "  alpha: number > 0 (default 16.0)",
        "  dropout: number >= 0, < 1 (default 0.0)",
        "  targets: auto or all-linear, or list of text (default auto)",
        "  rslora: true or false (default false)",
    ]


def test_no_keys() -> None:
    assert explain("fedavg").endswith("\n\nno keys")


@pytest.mark.usefixtures("own")
def test_ones_own_is_explained() -> None:
    assert explain("own_weft.steps:mine").splitlines() == [
        "own_weft.steps:mine (your own)",
        "",
        "mine: a transform of my own.",
        "",
        "Do something of my own.",
        "",
        "keys:",
        "  norm: number > 0 (required)",
        "  mode: flat or layer (default flat)",
        '  parts: list of text (default ["a"])',
        "  bounds: mapping of text to number, or null (default null)",
    ]


def test_an_unknown_plug_in_is_not_explained() -> None:
    with pytest.raises(JobError, match=r"no plug-in `fedavgg`; did you mean `fedavg`\?"):
        explain("fedavgg")
