"""delta: what travels is the difference, and the mean gets back what was sent."""

from dataclasses import replace

import pytest
import torch

from weft.algorithms.fedavg import fedavg
from weft.algorithms.frlora import frlora
from weft.algorithms.rolora import rolora
from weft.algorithms.scaffold import scaffold
from weft.core import pipeline, trees
from weft.core.errors import JobError, RunError
from weft.core.sums import Sum
from weft.core.types import At, Parcel, State, Tally, Wire
from weft.testing import toys
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.weigh import weigh


def value(*numbers: float, part: str = "adapter") -> State:
    return {part: {"w": torch.tensor(numbers)}}


def test_by_hand() -> None:
    """Sent 1; clients end at 2 and 6 with weights 1 and 3: they send 1 and 5, the mean is (1 + 15) / 4 + 1 = 5."""
    steps, total = [("delta", delta()), ("weigh", weigh())], Sum()
    for name, end, examples in (("a", 2.0, 1), ("b", 6.0, 3)):
        parcel = pipeline.down(steps, At(7, 1, name, value(1.0)), Parcel(value(end), examples))
        assert parcel.update["adapter"]["w"].item() == end - 1
        total.add(parcel.update, parcel.weight)
    state = pipeline.up(steps, total, Tally(1, {"a": 1, "b": 3}, {"a": 1, "b": 3}, 2, value(1.0)))
    assert state["adapter"]["w"].item() == 5.0


def test_parts_that_were_not_sent_are_differences_already() -> None:
    update = {**value(3.0), **value(9.0, part="change")}
    sent = {**value(1.0), **value(100.0, part="control")}
    parcel = delta().client(At(7, 1, "a", sent), Parcel(update, 1))
    assert trees.flatten(parcel.update) == {"adapter/w": torch.tensor([2.0]), "change/w": torch.tensor([9.0])}


def test_another_shape_is_refused() -> None:
    with pytest.raises(RunError, match="adapter/w has another shape than what was sent"):
        delta().client(At(7, 1, "a", value(1.0, 2.0)), Parcel(value(1.0), 1))


@pytest.mark.parametrize("make", [fedavg, scaffold, rolora, frlora])
def test_the_rounds_are_the_same_but_for_rounding(make: toys.Make) -> None:
    """Also where the trained part has another name than what was sent, and where ranks are put beside it."""
    plain, apart = (
        toys.play(make, steps, toy=toys.toy()).servers[-1].state
        for steps in ([("weigh", weigh())], [("delta", delta()), ("weigh", weigh())])
    )
    for name, tensor in trees.flatten(plain).items():
        assert torch.allclose(tensor, trees.flatten(apart)[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("make", [rolora, frlora])
def test_a_clip_to_nothing_stops_every_algorithm(make: toys.Make) -> None:
    """The difference is to where the client began, so without one the state stays; frlora adds B A - B A = 0."""
    steps = [("delta", delta()), ("clip", clip(1e-9)), ("weigh", weigh())]
    first, last = (toys.play(make, steps, toy=toys.toy()).used["a"], toys.adapter())
    for name, tensor in toys.effective(last).items():
        assert torch.allclose(toys.effective(first)[name], tensor, atol=1e-6), name


def test_an_algorithm_that_names_no_origin_would_show() -> None:
    """Negative control: a trained part under a name of its own is taken for a difference, and clipped away whole."""
    steps = [("delta", delta()), ("clip", clip(1e-9)), ("weigh", weigh())]
    unnamed = replace(rolora(), origin=fedavg().origin)
    played = toys.play(lambda: unnamed, steps, toy=toys.toy()).used["a"]
    assert not torch.allclose(toys.effective(played)["n.bias"], toys.adapter()["n.bias"], atol=1e-2)


def test_what_is_measured_is_the_adapter_and_not_the_difference() -> None:
    """The journal's numbers are those of the same rounds without delta."""
    from weft.core.round import run_round
    from weft.core.types import Server
    from weft.links.local import Local

    rows = []
    for steps in ([("weigh", weigh())], [("delta", delta()), ("weigh", weigh())]):
        toy, algorithm = toys.toy(), fedavg()
        link = Local([toys.ToySite(toy, algorithm, steps)])
        _, record = run_round(Server(algorithm.init(toys.adapter())), toy.federation(algorithm, steps), link)
        rows.append(record)
    for key in ("aggregation_error", "drift", "cosine"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)
    norms = [[client["update_norm"] for client in row["clients"].values()] for row in rows]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (Wire(delta=True), "subtract what was sent twice"),
        (Wire(encoded="quantize"), "quantize leaves codes"),
        (Wire(weighted=True), "put delta before weigh"),
    ],
)
def test_refused(wire: Wire, words: str) -> None:
    with pytest.raises(JobError, match=words):
        delta().check(wire)
    assert delta().check(Wire()) == Wire(delta=True)
