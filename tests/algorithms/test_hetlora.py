"""hetlora: zeros for the ranks that a client has not, norms for weights, clients that prune themselves."""

from math import floor

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms import hetlora as module
from weft.algorithms.fedavg import fedavg
from weft.algorithms.hetlora import hetlora, norm, padded, pull, tail
from weft.core import low_rank, trees
from weft.core.errors import JobError
from weft.core.types import Tensors

RANKS = {"a": 1, "b": 3, "c": 2}


def test_by_hand() -> None:
    """B A is 3 * 1 and 1 * 1, so the shares are 3/4 and 1/4 whatever the examples: B = 2.25 + 0.25 = 2.5, A = 1."""
    state = hetlora().init(cases.pair([[0.0]], [[1.0]]))
    updates = {"a": {"trained": cases.pair([[3.0]], [[1.0]])}, "b": {"trained": cases.pair([[1.0]], [[1.0]])}}
    after = cases.combined(hetlora(), state, updates, {"a": 1, "b": 100})["adapter"]
    assert cases.flat(after, "B") + cases.flat(after, "A") == [2.5, 1.0]


def test_by_hand_with_padding() -> None:
    """A client of rank 1 with B A = 2 * 2 and one of rank 2 with norm 4 count one half each; rank 3 nobody has."""
    state = hetlora().init(cases.pair([[0.0, 0.0, 7.0]], [[1.0], [1.0], [9.0]]))
    updates = {
        "a": {"trained": cases.pair([[2.0]], [[2.0]])},
        "b": {"trained": cases.pair([[0.0, 4.0]], [[6.0], [1.0]])},
    }
    after = cases.combined(hetlora(), state, updates, {"a": 1, "b": 1})["adapter"]
    assert cases.flat(after, "B") == [1.0, 2.0, 7.0]
    assert cases.flat(after, "A") == [4.0, 0.5, 9.0]


def rounds(count: int = 3, *, strength: float = 0.01, gamma: float = 0.99, **how: object) -> list[cases.Step]:
    rule = hetlora(gamma, strength)
    steps, state, kept = [], rule.init(cases.first()), None
    for number in range(1, count + 1):
        steps.append(cases.one_round(rule, state, number, kept=kept, **how))  # type: ignore[arg-type]
        state, kept = steps[-1].state, steps[-1].kept
    return steps


def test_the_server_takes_the_padded_mean_by_dense_norms() -> None:
    before = hetlora().init(cases.first())["adapter"]
    for step in rounds(ranks=RANKS):
        sent = {c: update["trained"] for c, update in step.updates.items()}
        norms = {c: float(sum(v.square().sum() for v in cases.dense(t).values())) ** 0.5 for c, t in sent.items()}
        for name, value in low_rank.factors(step.state["adapter"]).items():
            at, wanted = low_rank.axis(name) or 0, torch.zeros_like(value, dtype=torch.float64)
            for client, tensors in sent.items():
                rank = tensors[name].shape[at]
                wanted.narrow(at, 0, rank).add_(tensors[name].double() * norms[client] / sum(norms.values()))
            most = max(tensors[name].shape[at] for tensors in sent.values())
            assert torch.allclose(value.narrow(at, 0, most).double(), wanted.narrow(at, 0, most), atol=1e-6)
            assert torch.equal(value.narrow(at, most, 4 - most), before[name].narrow(at, most, 4 - most))
        assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())
        before = step.state["adapter"]


def test_equal_norms_and_ranks_are_fedavg() -> None:
    """One client's factors with other signs have its norm; both count the same, as with equal examples."""
    one = cases.first(begun=True)
    other = {name: -value if low_rank.A in name else value for name, value in one.items()}
    found = []
    for rule, part in ((hetlora(), "trained"), (fedavg(), "adapter")):
        updates = {"a": {part: one}, "b": {part: other}}
        found.append(cases.combined(rule, rule.init(cases.first()), updates, {"a": 2, "b": 2})["adapter"])
    assert all(torch.allclose(found[0][name], value, atol=1e-6) for name, value in found[1].items())


def test_equal_clients_are_a_fixed_point() -> None:
    step = rounds(1, same=True)[0]
    assert all(torch.allclose(v, step.ended["a"][n], atol=1e-7) for n, v in step.served.items())


def test_clients_take_the_first_ranks() -> None:
    state = hetlora().init(cases.first(begun=True))
    step = cases.one_round(hetlora(), state, ranks=RANKS, rate=0.0)
    for client, rank in RANKS.items():
        for name, value in low_rank.factors(step.ended[client]).items():
            at = low_rank.axis(name) or 0
            assert torch.equal(value.narrow(at, 0, rank), state["adapter"][name].narrow(at, 0, rank))
            assert not value.narrow(at, rank, 4 - rank).any()
        assert {low_rank.ranks(step.updates[client]["trained"], n) for n in low_rank.factors(step.served)} == {rank}


def test_norms_come_from_the_factors() -> None:
    tensors = cases.first(begun=True)
    wanted = sum(v.square().sum() for v in cases.dense(tensors, 1.0).values()) ** 0.5
    assert float(norm(tensors)) == pytest.approx(float(wanted), rel=1e-10)


def test_untrained_clients_count_by_their_examples() -> None:
    """All norms are zero in a round without training; heads and A are then the plain mean, and nothing divides by 0."""
    step = cases.one_round(hetlora(), hetlora().init(cases.first()), rate=0.0)
    assert all(torch.allclose(v, cases.first()[n], atol=1e-7) for n, v in step.served.items())


# --- pruning


def test_the_pull_is_the_gradient_of_the_tail() -> None:
    """By automatic differentiation, for two clients with tails of their own."""
    stack = {n: v.double().requires_grad_() for n, v in trees.expand(cases.first(begun=True), 2).items()}
    first = torch.tensor([1, 3])
    (0.7 * tail(stack, first)).sum().backward()
    zero = {name: torch.zeros_like(value) for name, value in stack.items()}
    got = pull(first, 0.7)(zero, {n: v.detach() for n, v in stack.items()}, torch.arange(2))
    for name in low_rank.factors(stack):
        assert torch.allclose(got[name], stack[name].grad, atol=1e-10)  # type: ignore[arg-type]
    assert not got["head.weight"].any()
    last = {name: value.detach()[1:] for name, value in stack.items()}
    swapped = pull(first, 0.7)({name: value[:1] for name, value in zero.items()}, last, torch.tensor([1]))
    assert all(torch.allclose(swapped[n], got[n][1:]) for n in got)


def test_a_tail_of_zeros_has_no_gradient() -> None:
    stack = trees.expand(cases.first(), 1)
    zero = {name: torch.zeros_like(value) for name, value in stack.items()}
    assert all(torch.isfinite(v).all() for v in pull(torch.tensor([2]), 1.0)(zero, stack, torch.tensor([0])).values())


def test_a_client_prunes_when_its_tail_shrinks_and_only_then() -> None:
    """Gamma 0.99 of 4 ranks is 3.96, so t = 3; a strong pull shrinks the last rank, none leaves it to grow."""
    assert floor(0.99 * 4) == 3
    assert round(0.99 * 4) == 4  # the planted bug: rounding to the nearest never prunes
    begun = hetlora().init(cases.first(begun=True))
    shrinks = cases.one_round(hetlora(0.99, 3.0), begun, rate=0.05)
    grows = cases.one_round(hetlora(0.99, 0.0), hetlora().init(cases.first()), rate=0.3)
    assert {float(kept["rank"]["rank"]) for kept in shrinks.kept.values()} == {3.0}
    assert {float(kept["rank"]["rank"]) for kept in grows.kept.values()} == {4.0}
    sent = shrinks.updates["a"]["trained"]
    assert {low_rank.ranks(sent, name) for name in low_rank.factors(sent)} == {3}
    again = cases.one_round(hetlora(0.99, 3.0), shrinks.state, 2, kept=shrinks.kept, rate=0.0)
    assert not any(v[3:].any() for n, v in again.ended["a"].items() if low_rank.A in n)


def test_nobody_prunes_below_the_least_or_at_gamma_one() -> None:
    begun = hetlora().init(cases.first(begun=True))
    for rule, ranks in ((hetlora(0.5, 3.0, min_rank=3), {4: 3, 2: 2}), (hetlora(1.0, 3.0), {4: 4})):
        for rank, wanted in ranks.items():
            step = cases.one_round(rule, begun, ranks=dict.fromkeys(cases.SIZES, rank), rate=0.05)
            assert {float(kept["rank"]["rank"]) for kept in step.kept.values()} == {wanted}


# --- planted bugs


def by_contributors(name: str, before: torch.Tensor, clients: list[Tensors], parts: torch.Tensor) -> torch.Tensor:
    """Divide each rank by the shares of those that have it, which is another method."""
    shares = padded(name, before, [{n: torch.ones_like(t) for n, t in c.items()} for c in clients], parts)
    return padded(name, before, clients, parts) / shares


def without_norms(name: str, before: torch.Tensor, clients: list[Tensors], parts: torch.Tensor) -> torch.Tensor:
    return padded(name, before, clients, torch.full_like(parts, 1 / len(parts)))


@pytest.mark.parametrize("broken", [by_contributors, without_norms])
def test_planted_bugs_are_caught(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "padded", broken)
    for check in (test_by_hand_with_padding, test_by_hand):
        try:
            check()
        except AssertionError:
            return
    pytest.fail("no check sees it")


@pytest.mark.parametrize("changes", [{"moments": "keep"}, {"low_rank": False}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    hetlora().check(cases.facts(mixed_ranks=True))
    with pytest.raises(JobError, match="hetlora"):
        hetlora().check(cases.facts(**changes))
