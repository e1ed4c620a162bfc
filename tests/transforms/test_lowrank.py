"""lowrank: the best approximation of a rank, in fewer numbers."""

import pytest
import torch

from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import At, Parcel, State, Wire
from weft.testing import toys
from weft.transforms.lowrank import halves, lowrank


def sent(state: State, rank: int) -> dict[str, torch.Tensor]:
    return trees.flatten(lowrank(rank).client(At(7, 1, "a"), Parcel(state, 1)).update)


def test_by_hand() -> None:
    """diag(3, 1) of rank 1 is diag(3, 0); the error is the singular value that is cut off, 1."""
    left, right = halves(torch.diag(torch.tensor([3.0, 1.0])), 1)
    assert (left @ right).tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_the_error_is_the_tail_of_the_singular_values() -> None:
    matrix = toys.draw((12, 9), "matrix")
    for rank in (1, 3, 8):
        left, right = halves(matrix, rank)
        tail = float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())
        assert trees.norm({"w": left.double() @ right.double() - matrix.double()}) == pytest.approx(tail, rel=1e-5)


def test_only_matrices_that_get_smaller_are_taken_apart() -> None:
    """(10, 10) of rank 2 is 40 numbers for 100; (3, 4) of rank 2 would be 14 for 12; a vector stays."""
    state = {"adapter": {"big": toys.draw((10, 10), 1), "bias": toys.draw((5,), 2), "small": toys.draw((3, 4), 3)}}
    flat = sent(state, 2)
    assert {name: tuple(value.shape) for name, value in flat.items()} == {
        "adapter/big.left": (10, 2),
        "adapter/big.right": (2, 10),
        "adapter/bias": (5,),
        "adapter/small": (3, 4),
    }
    back = lowrank(2).arrive(At(7, 1, "a", form=state), trees.unflatten(flat))
    assert torch.equal(back["adapter"]["small"], state["adapter"]["small"])
    assert list(back["adapter"]) == list(state["adapter"])


def test_a_matrix_of_that_rank_comes_back() -> None:
    matrix = toys.draw((10, 2), "l") @ toys.draw((2, 10), "r")
    state = {"adapter": {"w": matrix}}
    back = lowrank(2).arrive(At(7, 1, "a", form=state), trees.unflatten(sent(state, 2)))
    assert torch.allclose(back["adapter"]["w"], matrix, atol=1e-5)


def test_refused() -> None:
    with pytest.raises(JobError, match="put delta before it"):
        lowrank().check(Wire())
    with pytest.raises(JobError, match="topk leaves codes"):
        lowrank().check(Wire(delta=True, encoded="topk"))
    assert lowrank().check(Wire(down=True)) == Wire(down=True, encoded="lowrank")
