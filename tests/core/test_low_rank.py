"""Factors by name: what is joined, frozen, cut and approximated is the product, never a factor by its shape."""

import time

import pytest
import torch

from tests.algorithms.lora_cases import dense, distance, draw, first, pair
from weft.core import low_rank, trees
from weft.core.types import Tensors


def test_names_say_what_a_tensor_is() -> None:
    tensors = first()
    assert set(low_rank.rest(tensors)) == {"head.bias", "head.weight"}
    assert len(low_rank.pairs(tensors)) == 3
    assert all("lora_B" in b and "lora_A" in a for b, a in low_rank.pairs(tensors))
    assert low_rank.ranks(tensors, "base_model.model.x.q_proj.lora_B.default.weight") == 4
    assert low_rank.ranks(tensors, "head.weight") == low_rank.ranks({}, "m.lora_A.default.weight") == 0


def test_joined_factors_add_their_products() -> None:
    """[1 2] [3; 4] = 3 + 8 = 11."""
    joined = low_rank.join(pair([[1.0]], [[3.0]]), pair([[2.0]], [[4.0]]))
    assert dense(joined, 1.0)["m"].tolist() == [[11.0]]
    one, two = first(begun=True), {n: t * 0.5 for n, t in first(begun=True, rank=3).items()}
    wanted = trees.add(dense(one), dense(two))
    assert distance(dense(low_rank.join(one, two)), wanted) < 1e-7


def test_a_client_trains_above_what_rests_and_gives_back_its_own() -> None:
    side, own = low_rank.factors(first(begun=True, rank=3)), first(begun=True)
    start = low_rank.above(side, own)
    assert all(torch.equal(value, own[name]) for name, value in low_rank.below(side, start).items())
    assert distance(dense(start), trees.add(dense(side), dense(own))) < 1e-7


def test_frozen_ranks_have_no_gradient_and_others_all_of_it() -> None:
    side = trees.expand(low_rank.factors(first(rank=3)), 2)
    start = trees.expand(low_rank.above(low_rank.factors(first(rank=3)), first()), 2)
    grads = {name: torch.ones_like(value) for name, value in start.items()}
    left = low_rank.frozen(side)(grads, start, torch.arange(2))
    for name, value in left.items():
        rests = low_rank.ranks(side, name)
        whole = {-1: value.transpose(-1, -2), -2: value}.get(low_rank.axis(name) or 0)
        if whole is None:
            assert bool((value == 1).all())
        else:
            assert not whole[:, :rests].any()
            assert bool((whole[:, rests:] == 1).all())
    assert all(bool((grad == 1).all()) for grad in grads.values())


def test_clients_keep_their_first_ranks() -> None:
    whole = trees.expand(first(begun=True), 3)
    cut = low_rank.limited(whole, torch.tensor([0, 1, 3]))
    for client, rank in enumerate((4, 1, 3)):
        one = low_rank.trimmed(trees.pick(cut, client))
        assert {low_rank.ranks(one, name) for name in low_rank.factors(one)} == {rank}
        wanted = {
            name: value.narrow(low_rank.axis(name) or 0, 0, rank) if low_rank.axis(name) else value
            for name, value in trees.pick(whole, client).items()
        }
        assert all(torch.equal(one[name], wanted[name]) for name in wanted)


def test_ranks_without_a_product_are_left_out() -> None:
    tensors = low_rank.join(pair([[0.0]], [[1.0]]), pair([[2.0]], [[3.0]]), pair([[4.0]], [[0.0]]))
    kept = low_rank.compact(tensors)
    assert [kept[name].tolist() for _, name in low_rank.pairs(kept)] == [[[3.0]]]
    nothing = pair([[0.0, 0.0]], [[1.0], [2.0]])
    assert {low_rank.ranks(low_rank.compact(nothing, least), n) for n in nothing for least in (1,)} == {1}
    assert {low_rank.ranks(low_rank.compact(nothing), n) for n in nothing} == {0}


@pytest.mark.parametrize(("out", "inputs", "rank"), [(6, 9, 4), (4, 4, 4), (5, 12, 20), (9, 3, 7), (1, 1, 3)])
def test_the_decomposition_is_that_of_the_dense_product(out: int, inputs: int, rank: int) -> None:
    left, right = draw((out, rank), "left").double(), draw((rank, inputs), "right").double()
    u, values, vt = low_rank.svd(left, right)
    wanted = torch.linalg.svd(left @ right, full_matrices=False)
    padded = torch.cat([values, torch.zeros(len(wanted.S) - len(values), dtype=torch.float64)])
    assert torch.allclose(padded, wanted.S, atol=1e-10)
    assert torch.allclose(u * values @ vt, left @ right, atol=1e-10)
    assert torch.allclose(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64), atol=1e-10)
    assert bool((vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all())


def test_truncation_loses_the_tail_of_the_singular_values_and_no_more() -> None:
    left, right = draw((30, 8), "left").double(), draw((8, 20), "right").double()
    values = torch.linalg.svdvals(left @ right)
    for rank in (1, 3, 7, 8):
        b, a = low_rank.truncated(left, right, rank)
        lost = float((b @ a - left @ right).norm())
        assert lost == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-6, abs=1e-10)


def test_a_bound_of_full_rank_loses_nothing() -> None:
    tensors = low_rank.join(*[first(begun=True, rank=r) for r in (4, 7, 9)])
    kept = low_rank.bounded(tensors, None)
    assert {layer: value.shape for layer, value in dense(kept).items()}.keys() == dense(tensors).keys()
    assert sorted(low_rank.ranks(kept, a) for _, a in low_rank.pairs(kept)) == [4, 5, 6]
    assert distance(dense(kept), dense(tensors)) < 3e-7
    assert {low_rank.ranks(low_rank.bounded(tensors, 2), a) for _, a in low_rank.pairs(tensors)} == {2}


def test_the_norm_of_a_product_is_taken_from_its_factors() -> None:
    left, right = draw((2, 40, 3), "left"), draw((2, 3, 30), "right")
    wanted = torch.linalg.matrix_norm(left.double() @ right.double())
    assert torch.allclose(low_rank.product_norm(left, right), wanted, rtol=1e-10)


def test_no_dense_product_is_formed() -> None:
    """4096 x 4096, ten clients of rank 16, in less than a second; the dense decomposition takes a minute."""
    clients = [pair([], []) | {n: draw(s, n, i) for n, s in _wide().items()} for i in range(10)]
    stack = low_rank.stacked(clients, [0.1] * 10)
    began = time.perf_counter()
    b, a = (stack[f"m.lora_{part}.default.weight"] for part in "BA")
    low_rank.truncated(b, a, 16)
    assert time.perf_counter() - began < 2  # 0.2 s on an idle core


def _wide() -> dict[str, tuple[int, int]]:
    return {"m.lora_A.default.weight": (16, 4096), "m.lora_B.default.weight": (4096, 16)}


def by_shape(tensors: Tensors, rank: int) -> list[str]:
    """Recognise A as published code does: its first side is the rank."""
    return [name for name, value in tensors.items() if value.shape[0] == rank]


def test_shapes_would_have_misled() -> None:
    """The planted bug: in a layer of 4 x 4 with rank 4 both factors pass for A."""
    tensors = low_rank.factors(first())
    assert len(by_shape(tensors, 4)) == 4
    assert len(low_rank.pairs(tensors)) == 3
