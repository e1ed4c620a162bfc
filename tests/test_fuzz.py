"""A few hundred mutated inputs for each parser; benchmarks/fuzz.py takes a hundred thousand."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tests.fuzzing import Target, mutated, targets, tried

NAMES = (
    *("records", "job", "adapter config", "adapter weights", "wire", "checkpoint"),
    *("letter with an order", "letter with a reply"),
)


@pytest.mark.parametrize("name", NAMES)
def test_only_our_own_errors_come_out(name: str, tmp_path: Path) -> None:
    target, draw = targets(tmp_path)[name], Random(7)
    assert tried(target, target.sound, tmp_path) == "taken"
    outcomes = set()
    for number in range(300):
        outcome = tried(target, mutated(target.sound, draw), tmp_path)
        assert outcome in ("taken", "refused"), f"input {number}: {outcome}"
        outcomes.add(outcome)
    assert "refused" in outcomes


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_refused_or_taken(name: str, tmp_path: Path) -> None:
    target = targets(tmp_path)[name]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(some.binary(max_size=300))
    def check(content: bytes) -> None:
        assert tried(target, content, tmp_path) in ("taken", "refused")

    check()


def test_another_exception_would_be_seen(tmp_path: Path) -> None:
    """Negative control: a parser that lets a KeyError out, and one whose sentence has two lines."""
    from weft.core.errors import JobError

    def careless(content: bytes, folder: Path) -> object:
        return {}[content]

    def chatty(content: bytes, folder: Path) -> object:
        raise JobError("one\ntwo")

    assert tried(Target(careless, b""), b"x", tmp_path).startswith("KeyError")
    assert tried(Target(chatty, b""), b"x", tmp_path).startswith("a bad sentence")
