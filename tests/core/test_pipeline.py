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
    assert pipeline.check([("weigh", weigh())]) == Wire(weighted=True)


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
