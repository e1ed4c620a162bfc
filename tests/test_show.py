"""What `weft check` says before anything is trained."""

from typing import Any

import pytest

from weft import Job
from weft.prepare import prepare
from weft.show import generated


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
