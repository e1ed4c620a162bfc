"""Find a plug-in by its name and check its keys: a name is a file and a function, the signature is the schema."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from weft.core.errors import JobError, KeyProblem

FOLDERS = {
    "adapter": "adapters",
    "task": "tasks",
    "algorithm": "algorithms",
    "transform": "transforms",
    "split": "data",
}
"""Kind of plug-in -> the folder under weft/ that holds one file for each."""

Place = tuple[str | int, ...]
"""A place in a job: ("adapter", "lora", "rank")."""

_OWN = re.compile(r"[a-z_][a-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+:[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Choice:
    """A plug-in that a job names, with its keys."""

    name: str
    keys: Mapping[str, Any]

    def to_job(self) -> dict[str, Any]:
        """Return the choice as it stands in a job: {name: keys}."""
        return {self.name: dict(self.keys)}


def near(word: str, words: list[str]) -> str:
    """Return a did-you-mean clause, empty where nothing is near."""
    match = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean `{match[0]}`?" if match else ""


def names(kind: str) -> list[str]:
    """Return the names of Weft's own plug-ins of a kind."""
    files = sorted((Path(__file__).parent / FOLDERS[kind]).glob("*.py"))
    stems = [file.stem for file in files if file.stem != "__init__"]
    return [stem for stem in stems if re.search(rf"^def {stem}\(", _text(kind, stem), re.MULTILINE)]


def _text(kind: str, name: str) -> str:
    return (Path(__file__).parent / FOLDERS[kind] / f"{name}.py").read_text(encoding="utf8")


def find(kind: str, name: str) -> Callable[..., Any]:
    """Return the function behind a name: weft/<folder>/<name>.py:<name>, or a user's package.module:function."""
    if _OWN.fullmatch(name):
        return _find_own(kind, name)
    known = names(kind)
    if name not in known:
        raise JobError(
            f"there is no {kind} `{name}`{near(name, known)} (known: {', '.join(known)}; "
            "your own: package.module:function)"
        )
    function: Callable[..., Any] = getattr(importlib.import_module(f"weft.{FOLDERS[kind]}.{name}"), name)
    return function


def _find_own(kind: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise JobError(f"the {kind} `{name}` cannot be imported: {error}") from None
    except AttributeError:
        raise JobError(f"the module {module} has no function `{attribute}`") from None
    if not inspect.isfunction(function):
        raise JobError(f"the {kind} `{name}` is not a function")
    return function


def schema(function: Callable[..., Any]) -> type[BaseModel]:
    """Return the signature of a plug-in as a model that refuses unknown keys and wrong values."""
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return create_model(
        function.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )


def parse(kind: str, value: Any, path: Place = ()) -> Choice:
    """Read `name`, `{name: null}`, `{name: scalar}` or `{name: {key: value}}` and fill in the defaults.

    A scalar stands for the first key of the plug-in: `split: {by: source}` is `split: {by: {column: source}}`.
    Raise KeyProblem with the place below `path`.
    """
    if isinstance(value, Choice):
        value = value.to_job()
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise KeyProblem(path, f"name one {kind}, as `name` or `{{name: {{key: value}}}}`")
    name, keys = next(iter(value.items()))
    try:
        model = schema(find(kind, str(name)))
    except JobError as error:
        raise KeyProblem(path, str(error)) from None
    return Choice(str(name), validate(model, _keys(model, name, keys, path), (*path, str(name))).model_dump(mode="json"))


def _keys(model: type[BaseModel], name: str, keys: Any, path: Place) -> dict[str, Any]:
    if keys is None:
        return {}
    if isinstance(keys, Mapping):
        return {str(key): value for key, value in keys.items()}
    if not model.model_fields:
        raise KeyProblem(path, f"`{name}` takes no keys")
    return {next(iter(model.model_fields)): keys}


def build(choice: Choice, kind: str) -> Any:
    """Call the plug-in with its checked keys."""
    function = find(kind, choice.name)
    model = schema(function).model_validate(dict(choice.keys))
    return function(**{name: getattr(model, name) for name in type(model).model_fields})


def validate(model: type[BaseModel], values: Mapping[str, Any], path: Place) -> BaseModel:
    """Return the checked values; raise KeyProblem at the first that is wrong."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise problem(error, model, path) from None


def problem(error: ValidationError, model: type[BaseModel], path: Place) -> KeyProblem:
    """Turn a pydantic error into one sentence at one place."""
    first = error.errors()[0]
    place = (*path, *first["loc"])
    if first["type"] == "missing":
        return KeyProblem(place, "is missing")
    if first["type"] == "extra_forbidden":
        known = sorted(_fields(model, first["loc"][:-1]))
        return KeyProblem(place, f"unknown key{near(str(place[-1]), known)} (known: {', '.join(known) or 'none'})")
    message = first["msg"][0].lower() + first["msg"][1:]
    message = message.replace("input should be", "must be").removeprefix("value error, ")
    given = first.get("input")
    shown = repr(given) if isinstance(given, str | int | float | bool | None) else f"a {type(given).__name__}"
    return KeyProblem(place, f"{message}, got {shown[:60]}")


def _fields(model: type[BaseModel], steps: Place) -> set[str]:
    for step in steps:
        field = model.model_fields.get(str(step))
        if field is None or not inspect.isclass(field.annotation) or not issubclass(field.annotation, BaseModel):
            return set()
        model = field.annotation
    return {name for name, field in model.model_fields.items() if not field.exclude}


def explain(name: str) -> str:
    """Return a plug-in's kind, file, keys and docstring as text."""
    kinds = [kind for kind in FOLDERS if name in names(kind)]
    if not kinds:
        known = sorted(word for kind in FOLDERS for word in names(kind))
        raise JobError(f"there is no plug-in `{name}`{near(name, known)} (known: {', '.join(known)})")
    function = find(kinds[0], name)
    module = inspect.getmodule(function)
    lines = [f"{name} ({kinds[0]}): weft/{FOLDERS[kinds[0]]}/{name}.py", "", inspect.getdoc(module) or ""]
    lines += ["", inspect.getdoc(function) or "", "", "keys:" if schema(function).model_fields else "no keys"]
    for key, field in schema(function).model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(f"  {key}: {_type_name(field.annotation)} ({default})")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    text = str(annotation) if not inspect.isclass(annotation) else annotation.__name__
    return re.sub(r"typing\.|Annotated\[(\w+), [^\]]*\]", lambda m: m[1] or "", text)
