"""What `weft check` says before anything is trained."""

from typing import Any

import pytest

from weft import Job
from weft.prepare import prepare
from weft.show import Display, generated


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluate": {"on": ["loss"]}}, "none"),
        ({"evaluate": {"on": ["rouge"]}}, "6 of at most 64 tokens, by each of 2 models"),
        (
            {"evaluate": {"examples": 1, "max_new_tokens": 8}, "baselines": ["local", "centralized"]},
            "3 of at most 8 tokens, by each of 5 models",
        ),
    ],
)
def test_the_cost_of_generated_answers(changes: dict[str, Any], says: str, values: dict[str, Any]) -> None:
    """Six test records in three groups; federated, centralized and three local adapters are five models."""
    assert generated(prepare(Job(**{**values, **changes}))) == says


def test_a_round_that_tells_no_loss_is_shown_without_one() -> None:
    """Under discrete noise the training loss stays at the clients, and a job may measure nothing between rounds."""
    display = Display()
    display.round("federated", 1, {"train_loss": None})
    display.round("federated", 2, {"train_loss": 1.5, "test_loss": 2.0})
    assert display.progress.tasks[0].fields["loss"] == "train loss 1.500, test loss 2.000"
