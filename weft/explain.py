"""Explain a plug-in in words: its file, its docstrings, its keys with what they take."""

import inspect
import json
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from weft import plugins
from weft.core.errors import JobError, near

_WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    NoneType: "null",
    dict: "mapping",
}


def explain(name: str) -> str:
    """Return a plug-in's kind, file, keys and docstring as text."""
    if plugins.is_own(name):
        return _explained(f"{name} (your own)", plugins.find("plug-in", name))
    kinds = [kind for kind in plugins.FOLDERS if name in plugins.names(kind)]
    if not kinds:
        known = sorted(word for kind in plugins.FOLDERS for word in plugins.names(kind))
        raise JobError(f"there is no plug-in `{name}`{near(name, known)} (known: {', '.join(known)})")
    titles = {kind: f"{name} ({kind}): weft/{plugins.FOLDERS[kind]}/{name}.py" for kind in kinds}
    return "\n\n".join(_explained(title, plugins.find(kind, name)) for kind, title in titles.items())


def _explained(title: str, function: Callable[..., Any]) -> str:
    fields = plugins.schema(function).model_fields
    texts = [inspect.getdoc(inspect.getmodule(function)), inspect.getdoc(function)]
    keys = [
        f"  {key}: {_type_name(field.annotation)}{_limits(field.metadata)} "
        f"({'required' if field.is_required() else f'default {_plain(field.default)}'})"
        for key, field in fields.items()
    ]
    return "\n\n".join([title, *filter(None, texts), "\n".join(["keys:", *keys] if keys else ["no keys"])])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _type_name(annotation: Any) -> str:
    """Say in words what a key takes.

    >>> _type_name(Literal["all"] | list[str] | None)
    'all, or list of text, or null'
    """
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inside[0])
    if origin is Literal:
        return " or ".join(_plain(value) for value in inside)
    if origin in (Union, UnionType):
        return ", or ".join(_type_name(part) for part in inside)
    if origin in (list, tuple):
        return f"list of {_type_name(inside[0])}"
    if origin is dict:
        return f"mapping of {_type_name(inside[0])} to {_type_name(inside[1])}"
    return _WORDS.get(annotation, "anything" if annotation is Any else str(getattr(annotation, "__name__", annotation)))


def _limits(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [f"{sign} {getattr(row, name)}" for row in metadata for name, sign in signs.items() if hasattr(row, name)]
    return f" {', '.join(limits)}" if limits else ""
