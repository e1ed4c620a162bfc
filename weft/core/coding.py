"""Encoded parcels: what stands on the wire has a form that is known before, and is compared before it is decoded.

Sender and receiver know the names and shapes of what travels, so they do not travel. Where shapes are the sender's
own, such as ranks that grow or that a client has of its own, they go along as one tensor of whole numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from weft.core import pipeline, trees
from weft.core.errors import RunError
from weft.core.pipeline import SERVER, Pipeline
from weft.core.types import Algorithm, At, Parcel, State, Tensors, Wire

SHAPES = "shapes"  # the part that carries the sender's own shapes
_INT = torch.int32


def at_down(seed: int, number: int) -> At:
    """Return where the steps of the way down stand in a round: the same for the server and for every client."""
    return At(seed, number, SERVER)


def form_down(algorithm: Algorithm, initial: Tensors) -> State:
    """Return the form of what the server sends, but for ranks that grow."""
    first = algorithm.init(initial)
    return {part: first[part] for part in algorithm.sends}


def forms(steps: Pipeline, at: At, given: State) -> list[State]:
    """Return what stands before each step and after the last one, for a parcel of these shapes; values mean nothing.

    It ends before a step that leaves a ring: there is nothing to tell apart in one.
    """
    parcel, found, wire = Parcel(given, 1), [given], Wire(down=at.client == SERVER)
    for _, step in steps:
        wire = step.check(wire)
        if not wire.ring:
            parcel = step.client(at, replace(parcel, kept={}))
        found.append(parcel.update)
    return found


def encode(steps: Pipeline, at: At, parcel: Parcel, expected: State) -> Parcel:
    """Walk a parcel down; add its shapes where they are not the expected ones."""
    after, own = pipeline.down(steps, at, parcel), _sizes(parcel.update)
    if torch.equal(own, _sizes(expected)):
        return after
    return replace(after, update=after.update | {SHAPES: {SHAPES: own}})


def decode(steps: Pipeline, at: At, given: State, expected: State, *, free: bool = False) -> State:
    """Undo `encode`; raise RunError, in one sentence, for what no sender that follows these steps can have sent.

    free: the sender may have shapes of its own.
    """
    update = dict(given)
    if free and SHAPES in update:
        expected = _shaped(update.pop(SHAPES), expected)
    return decode_as(steps, at, update, forms(steps, at, expected))


def decode_as(steps: Pipeline, at: At, update: State, known: Sequence[State]) -> State:
    """Decode what must have these `forms`; raise RunError where it has others."""
    if wrong := _unlike(update, known[-1], any(step.varies for _, step in steps)):
        raise RunError(f"a message is damaged: {wrong}")
    return pipeline.arrive(steps, at, update, known)


def _unlike(update: State, form: State, varies: bool) -> str | None:
    if not varies:
        return trees.difference(update, form)
    return trees.difference(_emptied(update), _emptied(form))


def _emptied(state: State) -> State:
    """Return vectors without their numbers, so that only their length is not compared."""
    return {
        part: {name: tensor[:0] if tensor.dim() == 1 else tensor for name, tensor in tree.items()}
        for part, tree in state.items()
    }


def _sizes(state: State) -> Tensor:
    """Return all shapes in name order, one after the other."""
    return torch.tensor([size for tensor in trees.flatten(state).values() for size in tensor.shape], dtype=_INT)


def _shaped(told: dict[str, Tensor], expected: State) -> State:
    """Return a form of the shapes that a sender told; none may be larger than a rank can make it."""
    flat, sizes = trees.flatten(expected), told.get(SHAPES)
    dims = [tensor.dim() for tensor in flat.values()]
    if set(told) != {SHAPES} or sizes is None or sizes.dtype != _INT or tuple(sizes.shape) != (sum(dims),):
        raise RunError("a message is damaged: its shapes are not those of these tensors")
    result = {}
    for (name, tensor), shape in zip(flat.items(), _pieces(sizes.tolist(), dims), strict=True):
        if any(not 0 <= size <= max(tensor.shape) for size in shape):
            raise RunError(f"a message is damaged: {name} cannot be {shape}")
        result[name] = torch.zeros(1, dtype=tensor.dtype).expand(prod(shape)).view(shape)
    return trees.unflatten(result)


def _pieces(numbers: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [tuple(numbers[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
