"""What all checks share: promises as sentences, values as bits, functions that may not change their input."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from weft.core import trees
from weft.core.types import State


def bits(value: Any) -> Any:
    """Return all that a value holds, tensors as bytes, so that == means the same bits."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: bits(getattr(value, field.name)) for field in fields(value)}
    return bits(vars(value)) if hasattr(value, "__dict__") and not callable(value) else value


def require(sound: bool, sentence: str) -> None:
    """Raise AssertionError with a sentence; an assert statement would vanish under python -O."""
    if not sound:
        raise AssertionError(sentence)


def run_all(checks: Sequence[Callable[..., None]], waive: Collection[str], *given: Any, **named: Any) -> None:
    """Call the checks that are not waived; refuse a waived name that is no check."""
    known = {check.__name__ for check in checks}
    require(set(waive) <= known, f"`waive` names no check: {', '.join(sorted(set(waive) - known))}")
    for check in checks:
        if check.__name__ not in waive:
            check(*given, **named)


@contextmanager
def running(what: str) -> Iterator[None]:
    """Turn what a plug-in raises into an AssertionError."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it may not change what it is given."""

    def call(*given: Any) -> Any:
        before = bits(given)
        result = function(*given)
        require(bits(given) == before, f"`{name}` changes its input; make new tensors instead")
        return result

    return call


def require_float32(what: str, state: State) -> None:
    """Require that a state holds float32 and nothing else."""
    for name, tensor in trees.flatten(state).items():
        require(tensor.dtype == torch.float32, f"{what} holds {name} as {tensor.dtype}, not float32")
