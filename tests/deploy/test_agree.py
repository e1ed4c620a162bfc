"""Sites that differ are named before round 1, with what differs."""

from collections.abc import Callable
from typing import Any

import pytest

from weft.core.errors import PolicyError
from weft.deploy import agree

SAME: dict[str, Any] = {
    "fingerprint": "f" * 64,
    "tokenizer": "t" * 64,
    "first": "a" * 64,
    "classes": ["no", "yes"],
    "weft": "1",
    "versions": {"torch": "2", "transformers": "5", "peft": "0"},
}


def sites(**changed: Any) -> dict[str, dict[str, Any]]:
    return {"a": SAME, "b": {**SAME, **changed}, "c": SAME}


def test_sites_that_are_alike_agree() -> None:
    assert agree.check(sites()) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"fingerprint": "0" * 64},
            r"b: the base model or its vocabulary is not that of the others \(0{12}, .* f{12}\)",
        ),
        ({"tokenizer": "0" * 64}, "b: how the tokenizer divides a text is not that"),
        ({"first": "0" * 64}, "b: the first adapter, .* is not that"),
        ({"classes": ["maybe", "no"]}, r"b: the labels .* \(more: maybe; missing: yes\)"),
        ({"classes": ["yes", "no"]}, "in another order"),
        ({"weft": "2"}, r"b: the version of Weft is not that of the others \(2, the others have 1\)"),
    ],
)
def test_a_site_that_differs_is_named_with_the_difference(
    changed: dict[str, Any], says: str, record_property: Callable[[str, object], None]
) -> None:
    with pytest.raises(PolicyError, match=says) as caught:
        agree.check(sites(**changed))
    record_property("said", str(caught.value))


def test_another_torch_is_a_notice() -> None:
    (notice,) = agree.check(sites(versions={"torch": "3", "transformers": "5", "peft": "0"}))
    assert notice.startswith("torch is not the same everywhere (a 2, b 3, c 2)")
