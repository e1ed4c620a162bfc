"""A block holds as many clients as fill a step, and no more than whose adapters fit beside the base."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from weft import Job
from weft.core.types import Order
from weft.prepare import prepare, set_up
from weft.site import room
from weft.site.below import Below, Kept
from weft.site.lift import Lift
from weft.site.model import Loaded


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of 10 x 10 float32 is 400 bytes; an adapter of 6 is 24, four copies 96: 4 fit, and 10 into 1,000 bytes."""
    net, initial = nn.Linear(10, 10, bias=False), {"a": torch.zeros(6)}
    loaded = Loaded(net, None, torch.device("cpu"), {}, initial, Lift(net, {}), Below((), Kept(0)))
    monkeypatch.setattr(room, "LEAST", 0)
    assert room.fitting(loaded) == 4
    monkeypatch.setattr(room, "LEAST", 1000)
    assert room.fitting(loaded) == 10


def test_steps_side_by_side_by_hand(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bytes x 10 tokens x (20 x layers x hidden + words): as many as the room has."""
    loaded = set_up(prepare(Job(**values))).loaded
    config = loaded.net.config
    step = 4 * 10 * (20 * config.num_hidden_layers * config.hidden_size + config.vocab_size)
    monkeypatch.setattr(room, "LEAST", 3 * step + step // 2)
    assert room.abreast(loaded, 10) == 3
    assert room.abreast(loaded, 40) == 1
    assert room.abreast(loaded, 400) == 1


def test_blocks_keep_to_it(values: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three small clients are one block; control: with no room each is its own."""
    bench = set_up(prepare(Job(**values)))
    site = replace(bench.site(tmp_path, "federated", 0, print), abreast=1)
    order = Order("train", 1, tuple(sorted(site.train)), {})
    assert [len(names) for names in site.blocks(order)] == [3]
    monkeypatch.setattr("weft.site.site.fitting", lambda loaded: 1)
    assert [len(names) for names in site.blocks(order)] == [1, 1, 1]
