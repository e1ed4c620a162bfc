"""image_classification: its loss by hand, its fillers, and what its metrics count."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.core.errors import JobError
from weft.core.task import Example, Probe
from weft.tasks.image_classification import image_classification
from weft.testing.tiny import RECORDS, reader

TASK = image_classification()


class Fixed(nn.Module):
    """A model that takes a picture's first pixel for the number of a row of odds."""

    def __init__(self, odds: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(odds).log())

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[pixel_values[:, 0, 0, 0].long()])


def row(label: int, pixel: float) -> Example:
    return {"pixels": torch.full((3, 4, 4), pixel), "label": label}


def test_the_loss_by_hand_with_unequal_rows() -> None:
    """Odds 1 : 3 of picture 0 and 1 : 1 of picture 1: -log(3/4) for class 1, -log(1/4) for 0, -log(1/2) for any."""
    net = Fixed([[1.0, 3.0], [1.0, 1.0]])
    total, count = TASK.loss(net, TASK.collate([[row(1, 0), row(0, 0)], [row(0, 1)]], 0))
    assert total.tolist() == pytest.approx([-math.log(3 / 4) - math.log(1 / 4), -math.log(1 / 2)])
    assert count.tolist() == [2, 1]


def test_a_client_may_have_no_row_in_a_step() -> None:
    total, count = TASK.loss(Fixed([[1.0, 3.0]]), TASK.collate([[row(1, 0)], []], 0))
    assert total.tolist() == pytest.approx([-math.log(3 / 4), 0.0])
    assert count.tolist() == [1, 0]


def test_measure_counts_what_the_model_says() -> None:
    net = Fixed([[1.0, 3.0], [3.0, 1.0]])
    rows = [row(1, 0), row(0, 0), row(0, 1), row(1, 1)]
    with torch.no_grad():
        sums = TASK.measure(Probe(net, None, 3, 1, None), rows, ("loss",))
    assert sums.pop("loss") == pytest.approx(-2 * math.log(3 / 4) - 2 * math.log(1 / 4))
    assert sums == {"count": 4.0, "1>1": 1.0, "0>1": 1.0, "0>0": 1.0, "1>0": 1.0}


def test_a_label_that_training_did_not_have() -> None:
    with pytest.raises(JobError, match="a label that no training record has"):
        TASK.encode(reader(TASK.reads), RECORDS[:1], ("rain", "engine"))
