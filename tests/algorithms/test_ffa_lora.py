"""ffa_lora: the mean is exact because A is one for all, and A never moves or travels."""

from dataclasses import replace

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms.fedavg import fedavg
from weft.algorithms.ffa_lora import ffa_lora
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Tensors, Work
from weft.testing import check_algorithm
from weft.testing.sound import bits


def test_by_hand() -> None:
    """A = 2 for ever; B is 1 at a client of one example and 5 at one of three: B = 16/4 = 4 and B A = 8."""
    initial = cases.pair([[0.0]], [[2.0]])
    state = ffa_lora().init(initial)
    assert list(state["adapter"]) == ["m.lora_B.default.weight"]
    trained = {"a": torch.tensor([[1.0]]), "b": torch.tensor([[5.0]])}
    updates = {name: {"adapter": {"m.lora_B.default.weight": b}} for name, b in trained.items()}
    after = cases.combined(ffa_lora(), state, updates, {"a": 1, "b": 3})
    assert cases.dense(ffa_lora().serve(after, {}, initial), 1.0)["m"].tolist() == [[8.0]]


@pytest.mark.parametrize("ranks", [{}, {"a": 1, "b": 3}])
def test_the_mean_of_b_is_the_mean_of_the_products(ranks: dict[str, int]) -> None:
    state = ffa_lora().init(cases.first())
    for number in (1, 2, 3):
        step = cases.one_round(ffa_lora(), state, number, ranks=ranks)
        assert cases.error(step) < 1e-6
        assert cases.journal_error(step) < 1e-6
        assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())
        state = step.state
    assert cases.journal_error(step, adapter=cases.STABLE) < 1e-6
    for client, rank in ranks.items():
        trained = step.ended[client]["base_model.model.x.v_proj.lora_B.default.weight"]
        assert not trained[:, rank:].any()


def test_fedavg_is_not_exact() -> None:
    state = fedavg().init(cases.first())
    for number in (1, 2):
        step = cases.one_round(fedavg(), state, number)
        state = step.state
    assert cases.error(step) > 0.1


def test_a_is_the_first_for_ever_bit_for_bit() -> None:
    step = cases.one_round(ffa_lora(), ffa_lora().init(cases.first()))
    for number in (2, 3, 4, 5):
        step = cases.one_round(ffa_lora(), step.state, number)
    for tensors in (step.served, *step.ended.values()):
        assert bits({n: v for n, v in tensors.items() if "lora_A" in n}) == bits(
            {n: v for n, v in cases.first().items() if "lora_A" in n}
        )


def test_nothing_of_a_travels() -> None:
    step = cases.one_round(ffa_lora(), ffa_lora().init(cases.first()))
    names = [*trees.flatten(step.received), *(n for update in step.updates.values() for n in trees.flatten(update))]
    assert len(names) == 4 * 5
    assert not any("lora_A" in name for name in names)


def averaging_a() -> Algorithm:
    """The planted bug: A is sent and averaged too, equal as it is, and drifts in its last bit."""
    whole = ffa_lora()

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        update, kept = whole.client(work, received, kept)
        return {"adapter": trees.merged(work.initial, update["adapter"])}, kept

    return replace(whole, client=client)


def training_a() -> Algorithm:
    """The planted bug: A is left out of the update but not frozen."""
    whole = ffa_lora()

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        ended = work.train(trees.merged(work.initial, received["adapter"]))
        return whole.init(ended), kept

    return replace(whole, client=client)


def test_planted_bugs_are_caught() -> None:
    state = ffa_lora().init(cases.first())
    assert any("lora_A" in name for name in cases.one_round(averaging_a(), state).updates["a"]["adapter"])
    assert cases.error(cases.one_round(training_a(), state)) > 1e-2


@pytest.mark.parametrize(
    ("changes", "word"), [({"weight_decay": 0.1}, "weight_decay"), ({"low_rank": False, "adapter": "ia3"}, "ia3")]
)
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(JobError, match=word):
        ffa_lora().check(cases.facts(**changes))
    ffa_lora().check(cases.facts(mixed_ranks=True))


def test_conformance() -> None:
    check_algorithm(ffa_lora)


def test_one_step_is_a_step_on_the_pooled_gradient() -> None:
    """With one local step the mean of B is B minus the rate times the mean gradient of B."""
    from weft.testing import toys
    from weft.testing.toys import Toy
    from weft.transforms.weigh import weigh

    clients = {name: toys.client(name, size, steps=1) for name, size in (("a", 2), ("b", 5))}
    played = toys.play(ffa_lora, [("weigh", weigh())], 1, toy=Toy(clients, 2))
    start: Tensors = toys.adapter()
    name = "m.lora_B.default.weight"
    gradient = sum(client.examples / 7 * client.gradient(start)[name] for client in clients.values())
    assert torch.allclose(played.used["a"][name], start[name] - 0.05 * gradient, atol=1e-7)
