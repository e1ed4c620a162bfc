"""Read YAML as people mean it: YAML 1.2 scalars, no duplicate keys, and the line of every key.

PyYAML follows YAML 1.1, where `1e-4` is text, `on` and `yes` are booleans, `12:30:00` is 45000 and a second
key silently replaces the first. Here numbers are numbers, only true and false are booleans, a repeated key is
an error, and there are no tags and no dates.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from weft.core.errors import JobError

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}  # what a node without a tag has
_MOST_DIGITS = 300  # int() refuses thousands; a longer number is read as a float, so as infinite


class _Loader(yaml.SafeLoader):
    """Composes nodes only: every scalar keeps its text, so that we decide what it means."""


_Loader.yaml_implicit_resolvers = {}


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) <= _MOST_DIGITS:
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(inf|nan)", r"\1", text.replace("_", "").lower()))
    return text


class _Reader:
    """Turns nodes into values and remembers where each stood."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[Path, int] = {}
        self.count = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        """Return the value of a node; raise JobError with file and line."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.count += 1
        if self.count > 10_000 or len(path) > 20:
            raise _too_much(self.source)
        if node.tag not in _TAGS:
            line = node.start_mark.line + 1
            raise JobError(f"{self.source}, line {line}: the tag {node.tag} is not allowed; write the value plainly")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return _scalar(node)

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        """Return a mapping whose keys are text, each given once."""
        result: dict[str, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise JobError(f"{self.source}, line {line}: a key must be a word")
            key = str(key_node.value)
            if key in result:
                first = self.lines[(*path, key)]
                raise JobError(f"{self.source}, line {line}: `{key}` stands here a second time (first on line {first})")
            self.lines[(*path, key)] = line
            result[key] = self.value(child, (*path, key))
        return result


def _too_much(source: str) -> JobError:
    return JobError(f"{source}: a job is small; this has too many or too deeply nested values")


def read(text: str, source: str) -> tuple[Any, Mapping[Path, int]]:
    """Return the value of a YAML text and the line of every path in it.

    >>> read("lr: 1e-4\\nevaluate: {on: [loss]}", "job.yaml")[0]
    {'lr': 0.0001, 'evaluate': {'on': ['loss']}}
    """
    node = _compose(text, source)
    if node is None:
        return None, {}
    reader = _Reader(source)
    return reader.value(node, ()), reader.lines


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        # PyYAML splits one sentence: "expected a single document", "but found another document"
        said = f"{error.context} " if str(error.problem).startswith("but ") else ""
        raise JobError(f"{source}{where}: this is not YAML: {said}{error.problem or error.context}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise JobError(
            f"{source}, line {line}: this is not YAML: it holds a character that cannot be printed"
        ) from None
    except RecursionError:
        raise _too_much(source) from None
    return node
