"""Examples off the shelf are those that were put, whatever they hold."""

import tracemalloc
from typing import Any

import pytest
import torch

from weft.site.shelf import Shelf

WORDS = {"ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3]), "text": "two", "label": 1}
SHORT = {"ids": torch.tensor([2**40]), "labels": torch.empty(0, dtype=torch.int64), "text": "", "label": 2}


def same(found: Any, put: Any) -> bool:
    """Tell whether two examples have the same keys in order, types, dtypes and values."""
    if list(found) != list(put):
        return False
    for key, value in put.items():
        if type(found[key]) is not type(value):
            return False
        if isinstance(value, torch.Tensor):
            if found[key].dtype != value.dtype or not torch.equal(found[key], value):
                return False
        elif found[key] != value:
            return False
    return True


@pytest.mark.parametrize(
    "examples",
    [
        [WORDS, SHORT],
        [WORDS, {**WORDS, "more": 3}, SHORT],
        [{"label": 1}, WORDS],
        [{"pixels": torch.rand(3, 2, 2), "ids": torch.tensor([1])}, {"pixels": torch.rand(3, 2, 1), **SHORT}],
        [{"ids": torch.tensor([1]), "base": torch.tensor(0.5)}, {"ids": torch.tensor([1], dtype=torch.int32)}],
    ],
)
def test_what_is_put_comes_out(examples: list[Any]) -> None:
    shelf = Shelf()
    first, none, rest = shelf.put(examples[:1]), shelf.put([]), shelf.put(examples[1:])
    assert (len(first), len(none), len(rest)) == (1, 0, len(examples) - 1)
    assert all(same(found, put) for found, put in zip([*first, *none, *rest], examples, strict=True))
    assert same(rest[-1], examples[-1])
    assert [same(found, put) for found, put in zip(rest[:1], examples[1:2], strict=True)] == [True]
    assert not same(first[0], {**examples[0], "other": 1})
    with pytest.raises(IndexError):
        first[1]


def test_a_shelf_is_small() -> None:
    """20,000 examples of 8 + 8 numbers: 2.6 MB of numbers and 0.3 MB of ends; as small tensors over 10 MB of Python."""
    tracemalloc.start()
    shelf = Shelf()
    rows = [shelf.put([{"ids": torch.arange(8), "labels": torch.arange(8)}]) for _ in range(20_000)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows[-1][0]["ids"].tolist() == list(range(8))
    assert size < 6e6
