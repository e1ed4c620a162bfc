"""fedsa_lora: one A for all, B and the heads of each client its own, and nothing of them on the wire."""

from dataclasses import replace

import pytest
import torch

from tests.algorithms import lora_cases as cases
from tests.algorithms.test_local_heads import travelled
from weft.algorithms.fedsa_lora import fedsa_lora
from weft.algorithms.local_heads import keeping
from weft.core import low_rank
from weft.core.errors import JobError
from weft.core.types import Algorithm, State


def rounds(algorithm: Algorithm, count: int = 3) -> list[cases.Step]:
    steps: list[cases.Step] = []
    state: State = algorithm.init(cases.first())
    kept = None
    for number in range(1, count + 1):
        steps.append(cases.one_round(algorithm, state, number, kept=kept))
        state, kept = steps[-1].state, steps[-1].kept
    return steps


def test_by_hand() -> None:
    """A is 3 and 7 at weights 1 and 3: 6. With B 10 at one client and 100 at the other: 60 and 600."""
    rule = fedsa_lora()
    state = rule.init(cases.pair([[0.0]], [[2.0]]))
    updates = {c: {"adapter": {"m.lora_A.default.weight": torch.tensor([[a]])}} for c, a in (("a", 3.0), ("b", 7.0))}
    state = cases.combined(rule, state, updates, {"a": 1, "b": 3})
    for b, product in ((10.0, 60.0), (100.0, 600.0)):
        kept = {"own": {"m.lora_B.default.weight": torch.tensor([[b]])}}
        assert cases.dense(rule.serve(state, kept, {}), 1.0)["m"].tolist() == [[product]]


def test_each_client_has_the_mean_a_and_its_own_b() -> None:
    rule = fedsa_lora()
    for step in rounds(rule):
        used = {client: rule.serve(step.state, step.kept[client], cases.first()) for client in cases.SIZES}
        for client, tensors in used.items():
            assert tensors.keys() == cases.first().keys()
            for name, value in tensors.items():
                parts = [step.ended[c][name].double() * n / 8 for c, n in cases.SIZES.items()]
                wanted = torch.stack(parts).sum(0) if low_rank.A in name else step.ended[client][name].double()
                assert torch.allclose(value.double(), wanted, atol=1e-6)
        products = [cases.dense(tensors)["base_model.model.y.q_proj"] for tensors in used.values()]
        assert not torch.allclose(products[0], products[1], atol=1e-2)


def test_nothing_of_b_and_no_head_is_on_the_wire() -> None:
    assert travelled(fedsa_lora) == {"adapter/m.lora_A.default.weight"}
    assert all(low_rank.A in n for step in rounds(fedsa_lora()) for u in step.updates.values() for n in u["adapter"])


def test_a_client_goes_on_from_its_own_b() -> None:
    one = rounds(fedsa_lora(), 1)[0]
    still = cases.one_round(fedsa_lora(), one.state, 2, kept=one.kept, rate=0.0)
    for client in cases.SIZES:
        assert all(torch.equal(still.kept[client]["own"][n], v) for n, v in one.kept[client]["own"].items())


def keeping_a() -> Algorithm:
    """The planted bug: the factors are mixed up."""
    return replace(keeping(lambda name: low_rank.B not in name))


def keeping_what_is_square() -> Algorithm:
    """The planted bug: A is what has the rank as its first side; B of a square layer is shared as well."""
    shapes = {name: value.shape for name, value in cases.first().items()}
    return keeping(lambda name: shapes[name][0] != cases.RANK)


@pytest.mark.parametrize("broken", [keeping_a, keeping_what_is_square])
def test_planted_bugs_are_caught(broken: object) -> None:
    sent = {n for step in rounds(broken(), 1) for u in step.updates.values() for n in u["adapter"]}  # type: ignore[operator]
    assert any(low_rank.B in name for name in sent)


@pytest.mark.parametrize("changes", [{"mixed_ranks": True}, {"low_rank": False}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    fedsa_lora().check(cases.facts())
    with pytest.raises(JobError, match="fedsa_lora"):
        fedsa_lora().check(cases.facts(**changes))
