"""rolora: B in odd rounds, A in even ones, by the round's number; each round is exact."""

from dataclasses import replace

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms.rolora import rolora
from weft.core import low_rank, trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Work
from weft.testing import check_algorithm
from weft.testing.sound import bits


def test_by_hand() -> None:
    """A = 2 rests in round 1; B is 1 and 5 at weights 1 and 3: B = 4. In round 2 A is 3 and 7: A = 6, B A = 24."""
    state = rolora().init(cases.pair([[0.0]], [[2.0]]))
    for part, values, product in (("B", (1.0, 5.0), 8.0), ("A", (3.0, 7.0), 24.0)):
        name = f"m.lora_{part}.default.weight"
        updates = {client: {"trained": {name: torch.tensor([[v]])}} for client, v in zip("ab", values, strict=True)}
        state = cases.combined(rolora(), state, updates, {"a": 1, "b": 3})
        assert cases.dense(state["adapter"], 1.0)["m"].tolist() == [[product]]


def test_every_round_is_exact_and_the_other_factor_rests_bit_for_bit() -> None:
    state = rolora().init(cases.first())
    for number in range(1, 6):
        step = cases.one_round(rolora(), state, number)
        assert cases.error(step) < 1e-6
        assert cases.journal_error(step) < 1e-6
        rests, moves = (low_rank.A, low_rank.B) if number % 2 else (low_rank.B, low_rank.A)
        for tensors in (step.served, *step.ended.values()):
            assert all(torch.equal(v, state["adapter"][n]) for n, v in tensors.items() if rests in n)
            assert not any(torch.equal(v, state["adapter"][n]) for n, v in tensors.items() if moves in n)
        assert all(torch.allclose(step.served[n].double(), v, atol=1e-6) for n, v in cases.head_mean(step).items())
        state = step.state


def test_one_factor_travels_up() -> None:
    for number, part in ((1, "lora_B"), (2, "lora_A")):
        step = cases.one_round(rolora(), rolora().init(cases.first(begun=True)), number)
        sent = {name for update in step.updates.values() for name in trees.flatten(update) if "lora_" in name}
        assert len(sent) == 3
        assert all(part in name for name in sent)


def test_it_begins_with_b() -> None:
    """While B is zero the gradient of A is zero, so a first round on A would leave dW at zero."""
    step = cases.one_round(rolora(), rolora().init(cases.first()))
    assert min(float(value.abs().max()) for value in cases.dense(step.served).values()) > 0.1


def beginning_with_a() -> Algorithm:
    return shifted(lambda number: number + 1)


def by_rounds_of_its_own() -> Algorithm:
    """The planted bug: the turn is counted in the process and not by the round's number, so a restart breaks it."""
    seen: list[int] = []

    def turn(number: int) -> int:
        seen.append(number)
        return len(set(seen))

    return shifted(turn)


def shifted(turn: object) -> Algorithm:
    whole = rolora()

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        return whole.client(replace(work, round=turn(work.round)), received, kept)  # type: ignore[operator, type-var]

    return replace(whole, client=client)


def both_factors() -> Algorithm:
    """The planted bug: both factors are trained in each round."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        return {"trained": work.train(received["adapter"])}, kept

    return replace(rolora(), client=client)


def test_planted_bugs_are_caught() -> None:
    step = cases.one_round(beginning_with_a(), rolora().init(cases.first()))
    assert max(float(value.abs().max()) for value in cases.dense(step.served).values()) == 0
    with pytest.raises(AssertionError, match="resumed"):
        check_algorithm(by_rounds_of_its_own, ["check_reply_order", "check_block_size"])
    assert cases.error(cases.one_round(both_factors(), rolora().init(cases.first(begun=True)))) > 1e-2


@pytest.mark.parametrize(
    "changes", [{"weight_decay": 0.1}, {"mixed_ranks": True}, {"moments": "keep"}, {"low_rank": False}]
)
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    rolora().check(cases.facts())
    with pytest.raises(JobError, match="rolora"):
        rolora().check(cases.facts(**changes))


def test_the_turn_survives_a_stop() -> None:
    """Rounds 1 to 4 in one go, and with the state through bytes and the rule made anew before each."""
    from weft.testing import toys
    from weft.transforms.weigh import weigh

    for rounds in (1, 2, 3):
        plain, again = (
            toys.play(rolora, [("weigh", weigh())], rounds, toy=toys.toy(), restart=restart).servers[-1].state
            for restart in (False, True)
        )
        assert bits(plain) == bits(again)
