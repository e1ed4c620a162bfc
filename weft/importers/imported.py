"""What an import gives: the files of a job or suite, and a list that names every key of the source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from weft.core.errors import JobError
from weft.files import write_safely


@dataclass
class Notes:
    """What became of every key of the source."""

    carried: dict[str, str] = field(default_factory=dict)
    """Key -> what it is in the job."""
    changed: dict[str, str] = field(default_factory=dict)
    """Key -> what it is in the job, and what differs."""
    left: dict[str, str] = field(default_factory=dict)
    """Key -> what it would have meant, and why it is not carried over."""

    def text(self, source: str) -> str:
        """Return the notes as Markdown."""
        parts = [f"# Imported from {source}", ""]
        for title, rows in (
            ("Carried over", self.carried),
            ("Carried over with a difference", self.changed),
            ("Not carried over", self.left),
        ):
            parts += [f"## {title}", "", *[f"- `{key}`: {said}" for key, said in rows.items()], ""]
        return "\n".join(parts)


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value inside mappings; a list is a value.

    >>> list(leaves({"a": {"b": 1}, "c": [2]}))
    [('a.b', 1), ('c', [2])]
    """
    if isinstance(values, Mapping) and values:
        for key, inside in values.items():
            yield from leaves(inside, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def write(folder: Path, files: Mapping[str, Mapping[str, Any]], notes: Notes, source: str) -> None:
    """Write YAML files and IMPORTED.md into a new or empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(f"--out {folder}: is there and not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
        write_safely(folder / name, text.encode())
    write_safely(folder / "IMPORTED.md", notes.text(source).encode())


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return a YAML file's mapping, numbers as people mean them: `1e-4` is a number."""
    from weft.job import read_values

    return read_values(path, what, what)[0]
