"""flasc: so many entries down, so many up, all of them held by the server, which steps as fedadam does."""

import pytest
import torch

from tests.algorithms import lora_cases as cases
from weft.algorithms import flasc as module
from weft.algorithms.fedadam import fedadam
from weft.algorithms.flasc import flasc, largest
from weft.core import low_rank, trees
from weft.core.errors import JobError
from weft.core.types import Tensors
from weft.links import wire

ENTRIES = sum(value.numel() for value in low_rank.factors(cases.first()).values())


def test_by_hand() -> None:
    """Of 3, -5, 1 and 2 in both factors together the half of largest magnitude is 3 and -5."""
    kept = largest({n: v.unsqueeze(0) for n, v in cases.pair([[3.0], [1.0]], [[-5.0, 2.0]]).items()}, 0.5)
    assert cases.flat(kept, "B") + cases.flat(kept, "A") == [3.0, 0.0, -5.0, 0.0]


def test_the_server_step_by_hand() -> None:
    """The mean change 0.5 gives m = 0.05 and v = 0.99e-6 + 0.01 * 0.25 = 0.00250099: the step is
    0.1 * 0.05 / (0.0500099 + 0.001) = 0.0980202.
    """
    rule = flasc(1.0, 1.0, lr=0.1)
    state = rule.init(cases.pair([[0.0]], [[1.0]]))
    change = {"a": {"change": cases.pair([[0.25]], [[0.0]])}, "b": {"change": cases.pair([[0.75]], [[0.0]])}}
    after = cases.combined(rule, state, change, {"a": 1, "b": 1})["adapter"]
    assert cases.flat(after, "B") == [pytest.approx(0.0980202, abs=1e-6)]
    assert cases.flat(after, "A") == [1.0]


def used(tensors: Tensors) -> int:
    return sum(int((value != 0).sum()) for value in low_rank.factors(tensors).values())


def rounds(rule: object, count: int = 3) -> list[cases.Step]:
    steps, state = [], rule.init(cases.first(begun=True))  # type: ignore[attr-defined]
    for number in range(1, count + 1):
        steps.append(cases.one_round(rule, state, number))  # type: ignore[arg-type]
        state = steps[-1].state
    return steps


@pytest.mark.parametrize(("download", "upload"), [(0.25, 0.1), (0.29, 0.29), (1.0, 0.5)])
def test_exactly_so_many_entries_travel(download: float, upload: float) -> None:
    for step in rounds(flasc(download, upload)):
        assert used(step.received["sent"]) == int(ENTRIES * download + 1e-9)
        assert {used(update["change"]) for update in step.updates.values()} == {int(ENTRIES * upload + 1e-9)}
        assert set(step.received) == {"sent"}


def test_what_travels_is_the_largest_and_the_server_holds_all() -> None:
    for step in rounds(flasc(0.25, 0.1)):
        whole = torch.cat([v.flatten() for v in low_rank.factors(step.state["adapter"]).values()]).abs()
        sent = torch.cat([v.flatten() for v in low_rank.factors(step.state["sent"]).values()]).abs()
        assert float(sent[sent > 0].min()) >= float(whole[sent == 0].max())
        assert int((whole != 0).sum()) == ENTRIES
        for client, update in step.updates.items():
            change = trees.subtract(step.ended[client], step.received["sent"])  # from the sparse start
            for name, value in update["change"].items():
                kept = value != 0
                assert torch.equal(value[kept], change[name][kept])
                assert torch.equal(value, change[name]) or low_rank.axis(name) is not None


def test_with_every_entry_it_is_fedadam() -> None:
    ours, theirs = rounds(flasc(1.0, 1.0, lr=0.02)), rounds(fedadam(0.02))
    for left, right in zip(ours, theirs, strict=True):
        for name, value in right.served.items():
            assert torch.allclose(left.served[name], value, atol=1e-5)


def test_half_of_a_hundred_times_a_density_is_not_one_too_few() -> None:
    stack = {"m.lora_A.default.weight": torch.arange(1.0, 101).view(1, 10, 10)}
    assert int(0.29 * 100) == 28
    assert int((largest(stack, 0.29)["m.lora_A.default.weight"] != 0).sum()) == 29
    assert int((largest(stack, 1e-9)["m.lora_A.default.weight"] != 0).sum()) == 1


def per_tensor(tensors: Tensors, density: float) -> Tensors:
    """The planted bug: the largest of each tensor, not of all together."""
    return trees.merged(*({**largest({name: value}, density)} for name, value in low_rank.factors(tensors).items()))


def signed(tensors: Tensors, density: float) -> Tensors:
    """The planted bug: the largest values, not magnitudes."""
    found = largest({name: value + 100 for name, value in low_rank.factors(tensors).items()}, density)
    return {name: torch.where(value != 0, tensors[name], 0.0) for name, value in found.items()}


@pytest.mark.parametrize("broken", [per_tensor, signed])
def test_planted_bugs_are_caught(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "largest", lambda t, density: {**t, **broken(t, density)})  # type: ignore[operator]
    with pytest.raises(AssertionError):
        test_what_travels_is_the_largest_and_the_server_holds_all()


@pytest.mark.parametrize("changes", [{"mixed_ranks": True}, {"low_rank": False}])
def test_what_it_is_not_defined_for_is_refused(changes: dict[str, object]) -> None:
    flasc().check(cases.facts())
    with pytest.raises(JobError, match="flasc"):
        flasc().check(cases.facts(**changes))


def test_what_stays_takes_a_bit_on_the_wire() -> None:
    """1/32 + 0.25 of the bytes, names and heads aside; without it they would all be there."""
    stack = {"m.lora_A.default.weight": torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))}
    sent = trees.pick(largest(stack, 0.25), 0)
    sizes = [len(wire.pack({"change": tensors})) for tensors in (sent, trees.pick(stack, 0))]
    assert 0.28 < sizes[0] / sizes[1] < 0.30
    assert torch.equal(wire.unpack(wire.pack({"change": sent}))["change"]["m.lora_A.default.weight"], *sent.values())
