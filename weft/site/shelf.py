"""Encoded examples of all clients, end to end in a few long columns: small tensors each take twenty times their tokens.

An example is made when it is asked for: its tensors are views of the columns, equal to those that were put.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.core.task import Example

_Form = tuple[tuple[str, bool], ...]
"""The keys of an example in order, and which of them stand in columns."""


def _fits(value: object) -> bool:
    """Tell whether a value can stand in a column: whole numbers in one axis, on the processor."""
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1 and value.device.type == "cpu"


@dataclass
class Column:
    """Whole numbers of one key, end to end; `ends` says where each example's end."""

    values: "array[int]" = field(default_factory=lambda: array("q"))
    ends: "array[int]" = field(default_factory=lambda: array("q", [0]))

    def put(self, value: Tensor) -> None:
        """Add the numbers of the next example."""
        self.values.frombytes(value.contiguous().numpy().tobytes())
        self.ends.append(len(self.values))

    def view(self, place: int) -> Tensor:
        """Return an example's numbers, without a copy; nothing can be put any more while it lives."""
        begin, end = self.ends[place], self.ends[place + 1]
        if begin == end:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(self.values, dtype=torch.int64, count=end - begin, offset=8 * begin)


@dataclass
class Shelf:
    """Where examples are put while records are encoded; each has the form of the first, or is kept as it is."""

    form: _Form = ()
    columns: dict[str, Column] = field(default_factory=dict)
    beside: dict[int, Example] = field(default_factory=dict)
    """What of an example no column can hold."""
    odd: set[int] = field(default_factory=set)
    """Examples of another form, which stand beside whole."""
    count: int = 0

    def put(self, examples: Sequence[Example]) -> "Rows":
        """Add examples; return them as they can be read from here on."""
        begin = self.count
        for example in examples:
            self._put(example)
        return Rows(self, begin, self.count)

    def _put(self, example: Example) -> None:
        form = tuple((key, _fits(value)) for key, value in example.items())
        if not self.count:
            self.form, self.columns = form, {key: Column() for key, fits in form if fits}
        same = form == self.form
        for key, column in self.columns.items():
            column.put(example[key] if same else torch.empty(0, dtype=torch.int64))
        rest = {key: value for key, value in example.items() if not (same and key in self.columns)}
        if rest:
            self.beside[self.count] = rest
        if not same:
            self.odd.add(self.count)
        self.count += 1

    def example(self, place: int) -> Example:
        """Return an example as it was put."""
        rest = self.beside.get(place, {})
        if place in self.odd:
            return dict(rest)
        return {key: self.columns[key].view(place) if fits else rest[key] for key, fits in self.form}


@dataclass(frozen=True, slots=True)
class Rows(Sequence[Example]):
    """The examples of one client."""

    shelf: Shelf
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, place: Any) -> Any:
        found = range(self.begin, self.end)[place]
        return self.shelf.example(found) if isinstance(found, int) else [self.shelf.example(i) for i in found]

    def __iter__(self) -> Iterator[Example]:
        return map(self.shelf.example, range(self.begin, self.end))
