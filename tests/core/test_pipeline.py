"""The pipeline: down in order, up in reverse, refused before training where it cannot work."""

from dataclasses import replace

import pytest
import torch

from weft.core import pipeline
from weft.core.errors import JobError
from weft.core.sums import Sum
from weft.core.types import At, Parcel, State, Tally, Total, Transform, Wire
from weft.transforms.weigh import weigh

AT = At(7, 1, "a")


def times(factor: float) -> Transform:
    """Multiply at the client, and add at the server, so that both orders can be read off a number."""

    def client(at: At, parcel: Parcel) -> Parcel:
        return replace(parcel, update={"x": {"w": parcel.update["x"]["w"] * 10 + factor}})

    def server(total: Total, tally: Tally) -> Total:
        if isinstance(total, Sum):
            return total
        return {"x": {"w": total["x"]["w"] * 10 + factor}}

    return Transform(client=client, server=server)


def test_down_in_order_and_up_in_reverse() -> None:
    """Down: 0 -> 1 -> 12 -> 123. Up, after the division by one client: 123 -> 1232 -> 12321; the third still saw
    the integer sum.
    """
    steps = [("one", times(1)), ("two", times(2)), ("weigh", weigh()), ("three", times(3))]
    parcel = pipeline.down(steps, AT, Parcel({"x": {"w": torch.zeros(1)}}, 1))
    assert parcel.update["x"]["w"].tolist() == [123.0]
    total = Sum()
    total.add(parcel.update, parcel.weight)
    state = pipeline.up(steps, total, Tally(1, {"a": 1}, {"a": 1}))
    assert state["x"]["w"].tolist() == [12321.0]


def test_check_tells_what_leaves_a_client() -> None:
    assert pipeline.check([("weigh", weigh())]) == Wire(weighted=True, heaviest=2**20)


def test_a_pipeline_without_weights_is_refused() -> None:
    with pytest.raises(JobError, match=r"add `weigh: \{by: examples\}`"):
        pipeline.check([])


def test_the_step_that_refuses_is_named() -> None:
    with pytest.raises(JobError, match="pipeline: weigh: a second weigh would divide twice; keep one"):
        pipeline.check([("weigh", weigh()), ("weigh", weigh())])


def test_an_unchecked_pipeline_does_not_pass_a_sum_for_a_mean() -> None:
    with pytest.raises(TypeError, match="`check` was not called"):
        pipeline.up([], Sum(), Tally(1, {}, {}))


def test_an_empty_step_changes_nothing() -> None:
    state: State = {"x": {"w": torch.ones(2)}}
    parcel = Parcel(state, 3)
    idle = Transform()
    assert idle.check(Wire()) == Wire()
    assert idle.client(AT, parcel) is parcel
    assert idle.server(state, Tally(1, {}, {})) is state


def test_a_tally_adds_its_weights() -> None:
    assert Tally(1, {"a": 3, "b": 4}, {"a": 1, "b": 1}).total == 7


def counting(by: float) -> Transform:
    """Count the calls in a memory and add the count to the update."""

    def client(at: At, parcel: Parcel) -> Parcel:
        before = parcel.kept.get("calls", {"n": torch.zeros(1)})
        count = {"n": before["n"] + by}
        update = {
            part: {name: value + count["n"] for name, value in tree.items()} for part, tree in parcel.update.items()
        }
        return replace(parcel, update=update, kept={"calls": count})

    def arrive(at: At, update: State) -> State:
        return {part: {name: value * by for name, value in tree.items()} for part, tree in update.items()}

    return Transform(client=client, arrive=arrive, remembers=True)


def test_each_step_has_a_memory_of_its_own() -> None:
    """Two steps that count by 1 and by 10: after two rounds they hold 2 and 20 and have added 1 + 10, then 2 + 20."""
    steps = [("one", counting(1.0)), ("ten", counting(10.0))]
    first = pipeline.down(steps, AT, Parcel({"x": {"w": torch.zeros(1)}}, 1))
    second = pipeline.down(steps, AT, Parcel({"x": {"w": torch.zeros(1)}}, 1, kept=first.kept))
    assert first.update["x"]["w"].item() == 11
    assert second.update["x"]["w"].item() == 22
    assert sorted(float(tree["n"]) for tree in second.kept.values()) == [2, 20]


def test_replies_are_decoded_in_reverse_order() -> None:
    def steps(*factors: float) -> list[tuple[str, Transform]]:
        return [
            (str(f), Transform(arrive=lambda at, update, f=f: {"x": {"w": update["x"]["w"] * f + 1}})) for f in factors
        ]

    decoded = pipeline.arrive(steps(2.0, 3.0), AT, {"x": {"w": torch.ones(1)}})
    assert decoded["x"]["w"].item() == (1 * 3 + 1) * 2 + 1
