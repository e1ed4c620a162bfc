"""Find a plug-in by its name and check its keys: a name is a file and a function, the signature is the schema."""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from weft.core.errors import JobError, KeyProblem, near

FOLDERS = {
    "adapter": "adapters",
    "task": "tasks",
    "algorithm": "algorithms",
    "transform": "transforms",
    "split": "data",
    "sampler": "samplers",
    "pace": "paces",
}
"""Kind of plug-in -> the folder under weft/ that holds one file for each."""

Place = tuple[str | int, ...]
"""A place in a job: ("adapter", "lora", "rank")."""

# Strict: `true` is no number, "4" is no number, 2.0 is no count and `yes` is no truth.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
_OWN = re.compile(r"[a-z_][a-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+:[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Choice:
    """A plug-in that a job names, with its keys."""

    name: str
    keys: Mapping[str, Any]

    def to_job(self) -> dict[str, Any]:
        """Return the choice as it stands in a job: {name: keys}."""
        return {self.name: dict(self.keys)}


def names(kind: str) -> list[str]:
    """Return the names of Weft's own plug-ins of a kind."""
    files = sorted((Path(__file__).parent / FOLDERS[kind]).glob("*.py"))
    stems = [file.stem for file in files if file.stem != "__init__"]
    return [stem for stem in stems if re.search(rf"^def {stem}\(", _text(kind, stem), re.MULTILINE)]


def _text(kind: str, name: str) -> str:
    return (Path(__file__).parent / FOLDERS[kind] / f"{name}.py").read_text(encoding="utf8")


def is_own(name: str) -> bool:
    """Tell a user's own `package.module:function` from a plug-in of Weft."""
    return _OWN.fullmatch(name) is not None


def find(kind: str, name: str) -> Callable[..., Any]:
    """Return the function behind a name: weft/<folder>/<name>.py:<name>, or a user's package.module:function."""
    if is_own(name):
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
    except AttributeError:
        raise JobError(f"the module {module} has no function `{attribute}`") from None
    except Exception as error:  # a user's module may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise JobError(
            f"the {kind} `{name}` cannot be imported ({reason}); is it installed, or on PYTHONPATH?"
        ) from None
    if not inspect.isfunction(function):
        raise JobError(f"the {kind} `{name}` is not a function")
    return function


def schema(function: Callable[..., Any]) -> type[BaseModel]:
    """Return the signature of a plug-in as a model that refuses unknown keys and wrong values."""
    try:
        return create_model(function.__name__, __config__=_STRICT, **_fields_of(function))
    except JobError:
        raise
    except Exception as error:  # a user's annotations may fail in any way
        raise JobError(f"`{function.__name__}` is no plug-in: its types cannot be checked ({error})") from None


def _fields_of(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise JobError(f"`{function.__name__}` is no plug-in: its keys must be named, and it takes *{name}")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    return fields


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
    return Choice(
        str(name), validate(model, _keys(model, name, keys, path), (*path, str(name))).model_dump(mode="json")
    )


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
    model = validate(schema(function), choice.keys, (kind, choice.name))
    built = function(**{name: getattr(model, name) for name in type(model).model_fields})
    if type(built).__name__ != kind.capitalize():
        raise KeyProblem((kind,), f"`{choice.name}` is no {kind}: it returns {type(built).__name__}")
    return built


def validate(model: type[BaseModel], values: Mapping[str, Any], path: Place) -> BaseModel:
    """Return the checked values; raise KeyProblem at the first that is wrong."""
    try:
        text = json.dumps(dict(values))  # as JSON, where a list may stand for a tuple and nothing else is lenient
    except (TypeError, ValueError):
        raise KeyProblem(path, "the keys must hold text, numbers, true, false, lists and mappings only") from None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise problem(error, model, values, path) from None


# --- errors

_SAYS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of keys",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping of keys",
    "string_pattern_mismatch": "must have the form {pattern}",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}
"""Pydantic's type of error -> our words for it."""


def problem(error: ValidationError, model: type[BaseModel], values: Any, path: Place) -> KeyProblem:
    """Turn a pydantic error into one sentence at one place of `values`."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if first["type"] == "missing":
        return KeyProblem((*path, *first["loc"]), "is missing")
    if first["type"] == "extra_forbidden":
        known = sorted(_fields(model, first["loc"][:-1]))
        clause = f"unknown key{near(str(first['loc'][-1]), known)} (known: {', '.join(known) or 'none'})"
        return KeyProblem((*path, *first["loc"]), clause)
    # Each alternative of a type has its error: those that got furthest into the value are what was meant.
    places = [_place(values, row["loc"]) for row in errors if row["loc"][0] == first["loc"][0]]
    place = max(places, key=len)
    clauses = list(dict.fromkeys(_clause(row) for row, at in zip(errors, places, strict=False) if at == place))
    others = [clause.removeprefix("must be ") for clause in clauses[1:]]
    return KeyProblem((*path, *place), f"{' or '.join([clauses[0], *others])}, got {_shown(_at(values, place))}")


def _clause(row: Mapping[str, Any]) -> str:
    if row["type"] in _SAYS:
        return _SAYS[row["type"]].format(**row.get("ctx", {}))
    return str(row["msg"][0].lower() + row["msg"][1:]).removeprefix("value error, ")


def _place(values: Any, steps: Place) -> Place:
    """Leave out the steps that are pydantic's names of alternatives and no keys of the value."""
    place: Place = ()
    for step in steps:
        inside = _at(values, place)
        if (isinstance(inside, Mapping) and step in inside) or (
            isinstance(inside, list | tuple) and isinstance(step, int)
        ):
            place = (*place, step)
    return place


def _at(values: Any, place: Place) -> Any:
    for step in place:
        values = values[step]
    return values


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str | int | float):
        return repr(value)[:60]
    return "a mapping" if isinstance(value, Mapping) else "a list" if isinstance(value, list | tuple) else "an object"


def _fields(model: type[BaseModel], steps: Place) -> set[str]:
    for step in steps:
        field = model.model_fields.get(str(step))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()  # a section, or a section or null
        sections = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)]
        if not sections:
            return set()
        model = sections[0]
    return {name for name, field in model.model_fields.items() if not field.exclude}
