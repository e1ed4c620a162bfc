"""flexlora: the mean of the products, cut to the best of each rank."""

import pytest
import torch
from torch import Tensor

from tests.algorithms import lora_cases as cases
from weft.algorithms import flexlora as module
from weft.algorithms.flexlora import flexlora, split
from weft.core import low_rank
from weft.core.errors import JobError
from weft.core.types import Algorithm, Tensors
from weft.testing.sound import bits

RANKS = {"a": 1, "b": 3, "c": 2}


def test_by_hand() -> None:
    """The products are 2 e1 e1^T and 1 e2 e2^T, in the mean diag(1, 1/2); of rank 1: diag(1, 0), and 1/2 is lost."""
    updates = {
        "a": {"trained": cases.pair([[2.0], [0.0]], [[1.0, 0.0]])},
        "b": {"trained": cases.pair([[0.0], [1.0]], [[0.0, 1.0]])},
    }
    state = {"adapter": cases.pair([[0.0], [0.0]], [[1.0, 1.0]])}
    after = cases.combined(flexlora(), state, updates, {"a": 1, "b": 1})["adapter"]
    assert cases.dense(after, 1.0)["m"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert cases.flat(after, "A") == [1.0, 0.0]


@pytest.mark.parametrize("values", ["left", "both"])
def test_by_hand_where_the_values_go(values: str) -> None:
    """The singular value 4 goes to B, or 2 goes to each; its square root lost on one side would give 8."""
    b, a = split(torch.tensor([[4.0]]), torch.tensor([[1.0]]), torch.ones(1, 1), values)
    assert (b.item(), a.item()) == {"left": (4.0, 1.0), "both": (2.0, 2.0)}[values]


def rounds(algorithm: Algorithm, count: int = 3, first: Tensors | None = None, **how: object) -> list[cases.Step]:
    first = cases.first() if first is None else first
    steps, state = [], algorithm.init(first)
    for number in range(1, count + 1):
        steps.append(cases.one_round(algorithm, state, number, initial=first, **how))  # type: ignore[arg-type]
        state = steps[-1].state
    return steps


@pytest.mark.parametrize("values", ["left", "both"])
def test_each_layer_is_the_best_of_its_rank(values: str) -> None:
    for step in rounds(flexlora(values), ranks=RANKS):
        served = cases.dense(step.served)
        for layer, mean in cases.mean_dense(step.ended).items():
            u, s, vt = torch.linalg.svd(mean, full_matrices=False)
            best = u[:, :4] * s[:4] @ vt[:4]
            assert float((served[layer] - best).norm() / best.norm()) < 1e-6
        assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())
        assert cases.error(step) == pytest.approx(cases.journal_error(step), rel=1e-4)


def test_it_is_exact_at_full_rank() -> None:
    """9 ranks are as many as the widest layer needs; 2 clients of 2 ranks fit into 4."""
    for step in rounds(flexlora(), first=cases.first(rank=9)):
        assert cases.error(step) < 1e-6
        assert cases.journal_error(step) < 1e-6
    for step in rounds(flexlora(), sizes={"a": 1, "b": 5}, ranks={"a": 2, "b": 2}):
        assert cases.error(step, {"a": 1, "b": 5}) < 1e-6


def test_each_client_begins_with_the_best_of_its_own_rank() -> None:
    before, after = rounds(flexlora(), 2, ranks=RANKS)
    start = rounds(flexlora(), 1, ranks=RANKS)[0].state
    for client, rank in RANKS.items():
        began = cases.one_round(flexlora(), start, 2, ranks=RANKS, rate=0.0).ended[client]
        for layer, whole in cases.dense(before.served).items():
            u, s, vt = torch.linalg.svd(whole, full_matrices=False)
            assert torch.allclose(cases.dense(began)[layer], u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-5)
        sent = after.updates[client]["trained"]
        assert {low_rank.ranks(sent, name) for name in low_rank.factors(sent)} == {rank}


def test_ranks_that_are_not_needed_can_still_be_learned() -> None:
    """One client of rank 1 fills one rank; the others keep a row of A, or their gradients would be zero for ever."""
    step = rounds(flexlora(), 1, sizes={"a": 1}, ranks={"a": 1})[0]
    for b, a in low_rank.pairs(step.served):
        assert not step.served[b][:, 1:].any()
        assert torch.equal(step.served[a][1:], cases.first()[a][1:])
    nothing = rounds(flexlora("both"), 1, rate=0.0)[0]
    assert all(nothing.served[a].any(1).all() for _, a in low_rank.pairs(nothing.served))


def test_equal_clients_are_a_fixed_point() -> None:
    """Of the product: the factors are turned, which is why clients' moments of the optimizer are refused."""
    step = rounds(flexlora(), 2, same=True)[-1]
    assert cases.distance(cases.dense(step.served), cases.dense(step.ended["a"])) < 1e-6


def test_the_shapes_stay() -> None:
    for step in rounds(flexlora(), ranks=RANKS):
        assert {n: v.shape for n, v in step.state["adapter"].items()} == {n: v.shape for n, v in cases.first().items()}
    assert bits(rounds(flexlora())[-1].state) == bits(rounds(flexlora())[-1].state)


# --- planted bugs


def by_client_rank(left: Tensor, right: Tensor, before: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """Divide by alpha / r of the client's rank, hard-coded, in place of the model's one scale."""
    b, a = split(left, right, before, values)
    return b * (cases.SCALE / (16 / 3)), a


def root_lost(left: Tensor, right: Tensor, before: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """Give the values to B and their root to A."""
    return split(left, right, before, "left")[0], split(left, right, before, "both")[1]


def unweighted(left: Tensor, right: Tensor, before: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """Cut the stack to its first ranks in place of a decomposition: what is kept is the first client's."""
    return left[:, : len(before)].float(), right[: len(before)].float()


@pytest.mark.parametrize("broken", [by_client_rank, root_lost, unweighted])
def test_planted_bugs_are_caught(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "split", broken)
    step = rounds(flexlora(), 1, first=cases.first(rank=9))[0]
    assert cases.error(step) > 1e-2


@pytest.mark.parametrize("changes", [{"moments": "keep"}, {"low_rank": False}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    flexlora().check(cases.facts(mixed_ranks=True, weight_decay=0.1))
    with pytest.raises(JobError, match="flexlora"):
        flexlora().check(cases.facts(**changes))
