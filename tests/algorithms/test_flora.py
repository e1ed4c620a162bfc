"""flora: stacked factors are the mean of the products, whatever the ranks; everything before stays."""

from collections.abc import Callable, Sequence

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms import flora as module
from weft.algorithms.flora import flora
from weft.core import low_rank
from weft.core.errors import JobError, RunError
from weft.core.types import Tensors

RANKS = {"a": 1, "b": 3, "c": 2}


def test_by_hand() -> None:
    """B A is 1 * 1 and 3 * 5 at shares 1/4 and 3/4: B = [0.25 2.25], A = [1; 5], B A = 0.25 + 11.25 = 11.5."""
    state = flora().init(cases.pair([[0.0]], [[1.0]]))
    updates = {"a": {"trained": cases.pair([[1.0]], [[1.0]])}, "b": {"trained": cases.pair([[3.0]], [[5.0]])}}
    stack = low_rank.stacked([update["trained"] for update in updates.values()], [0.25, 0.75])
    assert (cases.flat(stack, "B"), cases.flat(stack, "A")) == ([0.25, 2.25], [1.0, 5.0])
    after = cases.combined(flora(), state, updates, {"a": 1, "b": 3})
    assert cases.dense(after["adapter"], 1.0)["m"].tolist() == [[pytest.approx(11.5)]]


def rounds(count: int = 4, max_rank: int | None = None, **how: object) -> list[cases.Step]:
    steps, state = [], flora().init(cases.first())
    for number in range(1, count + 1):
        steps.append(cases.one_round(flora(max_rank), state, number, **how))  # type: ignore[arg-type]
        state = steps[-1].state
    return steps


@pytest.mark.parametrize("ranks", [{}, RANKS])
def test_every_round_is_exact(ranks: dict[str, int]) -> None:
    for step in rounds(ranks=ranks):
        assert cases.error(step) < 1e-6
        assert cases.journal_error(step) < 1e-6
        assert cases.journal_error(step, adapter=cases.STABLE) < 1e-6
        assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())


def test_a_client_sends_its_own_ranks_alone() -> None:
    (step,) = rounds(1, ranks=RANKS)
    for client, rank in RANKS.items():
        sent = step.updates[client]["trained"]
        assert {low_rank.ranks(sent, name) for name in low_rank.factors(sent)} == {rank}
    both = {client: cases.trees.count(low_rank.factors(step.updates[client]["trained"])) for client in RANKS}
    assert both["b"] == 3 * both["a"]


def test_the_rank_is_that_of_all_clients_up_to_full_rank() -> None:
    """1 + 3 + 2 = 6 ranks, of at most 4, 5 and 6."""
    (step,) = rounds(1, ranks=RANKS)
    assert [low_rank.ranks(step.served, a) for _, a in low_rank.pairs(step.served)] == [4, 5, 6]


def test_a_round_adds_to_all_before_it() -> None:
    """What clients send is their own change alone: dW after = dW before + sum_k p_k of it."""
    before, after = rounds(2, ranks=RANKS)
    own = {client: update["trained"] for client, update in after.updates.items()}
    added = cases.mean_dense(own)
    wanted = {layer: value + added[layer] for layer, value in cases.dense(before.served).items()}
    assert cases.distance(cases.dense(after.served), wanted) < 1e-6


def test_every_client_begins_each_round_with_factors_of_its_own() -> None:
    steps = rounds(2, rate=0.0)
    drawn = [step.ended[client] for step in steps for client in cases.SIZES]
    name = "base_model.model.y.q_proj.lora_A.default.weight"
    assert len({tuple(tensors[name][-4:].flatten().tolist()) for tensors in drawn}) == 6
    assert all(float(value.abs().max()) == 0 for step in steps for value in cases.dense(step.served).values())
    spread = torch.cat([tensors[name][-4:].flatten() for tensors in drawn]).std()
    assert float(spread) == pytest.approx(1 / 18**0.5, rel=0.25)  # 1/sqrt(3 in), 6 inputs


def test_it_goes_on_from_a_first_adapter_that_is_not_zero() -> None:
    """As with init pissa, which takes the first product out of the base."""
    first = cases.first(begun=True)
    step = cases.one_round(flora(), flora().init(first), initial=first, rate=0.0)
    assert cases.distance(cases.dense(step.served), cases.dense(first)) < 1e-6


def test_a_bound_keeps_the_best_of_its_rank() -> None:
    (whole,), (cut,) = rounds(1), rounds(1, max_rank=3)
    for layer, value in cases.dense(whole.served).items():
        left = torch.linalg.svdvals(value)[3:].square().sum().sqrt()
        assert float((cases.dense(cut.served)[layer] - value).norm()) == pytest.approx(float(left), rel=1e-5)


# --- planted bugs

Stack = Callable[[Sequence[Tensors], Sequence[float]], Tensors]


def weighted_twice(clients: Sequence[Tensors], parts: Sequence[float]) -> Tensors:
    """Put p_k on both factors, as p_k on A and on B does."""
    both = low_rank.stacked(clients, parts)
    a = next(name for name in both if low_rank.A in name)
    weights = [torch.full((len(one[a]),), part) for one, part in zip(clients, parts, strict=True)]
    return {n: v * torch.cat(weights).unsqueeze(1) if low_rank.A in n else v for n, v in both.items()}


def scale_twice(clients: Sequence[Tensors], parts: Sequence[float]) -> Tensors:
    return low_rank.stacked(clients, [part * cases.SCALE for part in parts])


def scale_dropped(clients: Sequence[Tensors], parts: Sequence[float]) -> Tensors:
    return low_rank.stacked(clients, [part / cases.SCALE for part in parts])


def scale_by_own_rank(clients: Sequence[Tensors], parts: Sequence[float]) -> Tensors:
    """Take alpha / r_k for each client though the model has one scale."""
    name = "base_model.model.y.q_proj.lora_A.default.weight"
    return low_rank.stacked(clients, [p * 4 / len(c[name]) for p, c in zip(parts, clients, strict=True)])


def first_client_alone(clients: Sequence[Tensors], parts: Sequence[float]) -> Tensors:
    """Misspell the accumulator, so that all but client 0 are lost."""
    return low_rank.stacked(clients[:1], parts[:1])


@pytest.mark.parametrize("broken", [weighted_twice, scale_twice, scale_dropped, scale_by_own_rank, first_client_alone])
def test_planted_bugs_are_caught(broken: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        stacked = staticmethod(broken)

        def __getattr__(self, name: str) -> object:
            return getattr(low_rank, name)

    monkeypatch.setattr(module, "low_rank", Broken())
    assert cases.error(rounds(1, ranks=RANKS)[0]) > 1e-2


def test_merging_without_what_was_before_is_caught() -> None:
    """The negative control of the whole history: the second round alone is far from what clients ended with."""
    before, after = rounds(2)
    alone = {client: update["trained"] for client, update in after.updates.items()}
    assert cases.distance(cases.mean_dense(alone), cases.mean_dense(after.ended)) > 0.1
    assert before.served.keys() == after.served.keys()


@pytest.mark.parametrize("changes", [{"weight_decay": 0.1}, {"moments": "keep"}, {"low_rank": False}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    flora().check(cases.facts(mixed_ranks=True))
    with pytest.raises(JobError, match="flora"):
        flora().check(cases.facts(**changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: v for n, v in t.items() if "x.v_proj.lora_B" not in n}, r"v_proj\.lora_B.* is missing"),
        (lambda t: {**t, "z.lora_A.default.weight": torch.ones(1, 2)}, "z.* is not expected"),
        (lambda t: {n: v[:-1] if "x.v_proj.lora_B" in n else v for n, v in t.items()}, "does not fit"),
        (lambda t: {n: v[:-1] if "x.v_proj.lora_A" in n else v for n, v in t.items()}, "have unlike ranks"),
        (lambda t: {n: v[:-1] if n == "head.bias" else v for n, v in t.items()}, "head.bias is .* does not fit"),
    ],
)
def test_a_reply_of_other_layers_is_named(change: Callable[[Tensors], Tensors], words: str) -> None:
    state, good = flora().init(cases.first()), cases.first(begun=True, rank=2)
    with pytest.raises(RunError, match=f"round 1: client b: .*{words}"):
        cases.combined(flora(), state, {"a": {"trained": good}, "b": {"trained": change(good)}}, {"a": 1, "b": 1})
