"""A site refuses a global adapter that honest rounds cannot have reached."""

from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft import Job
from weft.algorithms.fedavg import fedavg
from weft.algorithms.krum import krum
from weft.core.errors import RunError
from weft.core.types import Wire
from weft.site.guard import bound, too_far

CLIPPED = Wire(weighted=True, delta=True, norm=0.5)


def test_by_hand() -> None:
    """Clip 0.5: after three rounds 1.5 at most; (0.9, 1.2) is 1.5 away from zero, (0.9, 1.3) is 1.58."""
    first, most = {"w": torch.zeros(2)}, bound(fedavg(), CLIPPED, 3)
    assert most == pytest.approx(1.5, rel=1e-4)
    assert too_far({"adapter": {"w": torch.tensor([0.9, 1.2])}}, first, most) is None
    assert "1.581 away from the first one" in str(too_far({"adapter": {"w": torch.tensor([0.9, 1.3])}}, first, most))


def test_before_the_first_round_nothing_may_have_moved() -> None:
    most = bound(fedavg(), CLIPPED, 0)
    assert too_far({"adapter": {"w": torch.ones(1)}}, {"w": torch.ones(1)}, most) is None
    assert too_far({"adapter": {"w": torch.ones(1)}}, {"w": torch.zeros(1)}, most)


def test_no_bound_where_none_is_known() -> None:
    """Without clip, with noise, and for a rule that is no mean: krum takes one update, a median may be longer."""
    assert bound(fedavg(), Wire(weighted=True), 1) is None
    assert bound(fedavg(), Wire(weighted=True, norm=1.0, noise=1.0), 1) is None
    assert bound(krum(), CLIPPED, 1) is None


def test_honest_rounds_pass_and_a_moved_adapter_does_not(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server adds 0.01 to every number of the adapter after the first round: far beyond a clip of 0.001."""
    values |= {
        "pipeline": ["delta", {"clip": 0.001}, "weigh"],
        "baselines": [],
        "evaluate": {"every": 0, "on": ["loss"]},
    }
    weft.run(Job(**values), tmp_path / "honest")
    from weft.core.types import State

    def server(state: State, update: State, tally: Any) -> State:
        return {"adapter": {name: value + 0.01 for name, value in update["adapter"].items()}}

    monkeypatch.setattr("weft.plugins.find", _found(server))
    with pytest.raises(RunError, match=r"round 2: client site-\d: the global adapter is .* away from the first one"):
        weft.run(Job(**values), tmp_path / "moved")


def _found(server: Any) -> Any:
    from dataclasses import replace

    from weft import plugins
    from weft.core.types import Algorithm

    find = plugins.find

    def fedavg_that_moves() -> Algorithm:
        return replace(fedavg(), server=server)

    return lambda kind, name: fedavg_that_moves if name == "fedavg" else find(kind, name)
