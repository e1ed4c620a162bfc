"""Arithmetic on named tensors, by hand; a stack of clients gives the bits of each client."""

import pytest
import torch

from weft.core import trees
from weft.core.types import State

LEFT = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
RIGHT = {"a": torch.tensor([10.0, 20.0]), "b": torch.tensor([[30.0]])}


def listed(tree: dict[str, torch.Tensor]) -> dict[str, object]:
    return {name: tensor.tolist() for name, tensor in tree.items()}


def test_add_and_subtract_by_hand() -> None:
    """1 + 0.5 * 10 = 6; 2 + 0.5 * 20 = 12; 3 + 0.5 * 30 = 18."""
    assert listed(trees.add(LEFT, RIGHT, 0.5)) == {"a": [6.0, 12.0], "b": [[18.0]]}
    assert listed(trees.subtract(RIGHT, LEFT)) == {"a": [9.0, 18.0], "b": [[27.0]]}


def test_norm_by_hand() -> None:
    """The root of 1 + 4 + 9 + 11 * 11 + 3 * 3 = 144 is 12."""
    assert trees.norm({**LEFT, "c": torch.tensor([11.0, 3.0])}) == 12.0
    assert trees.count(LEFT) == 3


@pytest.mark.parametrize("size", [1, 7, 16, 33, 1000])
def test_a_stack_has_the_bits_of_each_client(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    rows = [{"w": torch.randn(size, generator=draw)} for _ in range(6)]
    others = [{"w": torch.randn(size, generator=draw)} for _ in range(6)]
    together = trees.add(trees.stack(rows), trees.stack(others), 0.1)
    for place in range(6):
        alone = trees.add(rows[place], others[place], 0.1)
        assert torch.equal(trees.pick(together, place)["w"], alone["w"])


def test_stack_expand_and_pick_undo_each_other() -> None:
    stacked = trees.stack([LEFT, RIGHT])
    assert {name: tuple(tensor.shape) for name, tensor in stacked.items()} == {"a": (2, 2), "b": (2, 1, 1)}
    assert listed(trees.pick(stacked, 1)) == listed(RIGHT)
    assert listed(trees.pick(trees.expand(LEFT, 3), 2)) == listed(LEFT)
    states = trees.stack_states([{"x": LEFT}, {"x": RIGHT}])
    assert listed(trees.pick_state(states, 0)["x"]) == listed(LEFT)
    assert listed(trees.pick_state(trees.expand_state({"x": LEFT}, 2), 1)["x"]) == listed(LEFT)
    assert trees.stack_states([{}, {}]) == {}


def test_slices_share_no_memory() -> None:
    stacked = trees.expand(LEFT, 2)
    stacked["a"][0] = 0.0
    picked = trees.pick(stacked, 1)
    picked["a"].zero_()
    assert stacked["a"][1].tolist() == LEFT["a"].tolist() == [1.0, 2.0]


def test_the_first_bad_tensor_is_named() -> None:
    bad: State = {"x": LEFT, "y": {"b": torch.tensor([1.0, float("nan")]), "c": torch.tensor([float("inf")])}}
    assert trees.not_finite(bad) == "y/b"
    assert trees.not_finite({"y": {"c": torch.tensor([-float("inf")])}}) == "y/c"
    assert trees.not_finite({"x": LEFT}) is None


@pytest.mark.parametrize(
    ("got", "words"),
    [
        ({"x": {"a": torch.ones(2)}}, "x/b is missing"),
        ({"x": {**LEFT, "c": torch.ones(1)}}, "x/c is not expected"),
        ({"x": {**LEFT, "a": torch.ones(3)}}, "x/a is (3,) torch.float32, not (2,) torch.float32 as expected"),
        ({"x": {**LEFT, "a": torch.ones(2).half()}}, "x/a is (2,) torch.float16, not (2,) torch.float32 as expected"),
        ({"x": RIGHT}, None),
    ],
)
def test_a_difference_in_words(got: State, words: str | None) -> None:
    assert trees.difference(got, {"x": LEFT}) == words


def test_flatten_is_undone_and_in_name_order() -> None:
    state: State = {"y": {"n/b": torch.ones(1), "a": torch.zeros(1)}, "x": {"a": torch.ones(2)}}
    flat = trees.flatten(state)
    assert list(flat) == ["x/a", "y/a", "y/n/b"]
    back = trees.unflatten(flat)
    assert {part: listed(tree) for part, tree in back.items()} == {
        "x": {"a": [1.0, 1.0]},
        "y": {"a": [0.0], "n/b": [1.0]},
    }
