"""Arithmetic on named tensors; the same functions serve one client and a stack of clients."""

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from weft.core.errors import RunError
from weft.core.task import Batch
from weft.core.types import State, Tensors


def add(left: Tensors, right: Tensors, scale: float = 1.0) -> Tensors:
    """Return left + scale * right, name by name."""
    return {name: torch.add(tensor, right[name], alpha=scale) for name, tensor in left.items()}


def subtract(left: Tensors, right: Tensors) -> Tensors:
    """Return left - right, name by name."""
    return add(left, right, -1.0)


def zeros(tree: Tensors) -> Tensors:
    """Return zeros in the shapes of named tensors."""
    return {name: torch.zeros_like(tensor) for name, tensor in tree.items()}


def scale(tree: Tensors, factors: Tensor) -> Tensors:
    """Multiply each client's tensors, (clients, *shape), by its own factor, (clients,)."""
    return {name: value * factors.to(value).view(-1, *[1] * (value.dim() - 1)) for name, value in tree.items()}


def by_rows(tree: Tensors) -> Callable[[Tensor], Tensors]:
    """Return a function from rows to those rows of a stack, on the device of the rows, where it is moved once."""
    moved: dict[torch.device, Tensors] = {}

    def chosen(rows: Tensor) -> Tensors:
        if rows.device not in moved:
            moved[rows.device] = on_device(tree, rows.device)
        return {name: tensor[rows] for name, tensor in moved[rows.device].items()}

    return chosen


def merged(*trees: Tensors) -> Tensors:
    """Return named tensors together in name order; of one name the last."""
    return dict(sorted({name: tensor for tree in trees for name, tensor in tree.items()}.items()))


def stack(trees: Iterable[Tensors]) -> Tensors:
    """Give named tensors of several clients a leading client axis: shapes (clients, *shape)."""
    rows = list(trees)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def expand(tree: Tensors, clients: int) -> Tensors:
    """Repeat named tensors along a new leading client axis."""
    return {name: tensor.expand(clients, *tensor.shape).clone() for name, tensor in tree.items()}


def pick(tree: Tensors, client: int) -> Tensors:
    """Return one client's slice of a stack."""
    return {name: tensor[client].clone() for name, tensor in tree.items()}


def stack_states(states: Iterable[State]) -> State:
    """Stack states of several clients part by part."""
    rows = list(states)
    return {part: stack(row[part] for row in rows) for part in rows[0]}


def expand_state(state: State, clients: int) -> State:
    """Repeat a state along a new leading client axis."""
    return {part: expand(tree, clients) for part, tree in state.items()}


def pick_state(state: State, client: int) -> State:
    """Return one client's slice of a stacked state."""
    return {part: pick(tree, client) for part, tree in state.items()}


def count(tree: Tensors) -> int:
    """Return how many numbers named tensors hold."""
    return sum(tensor.numel() for tensor in tree.values())


def norm(tree: Tensors) -> float:
    """Return the joint L2 norm over all tensors, in float64."""
    return float(sum((tensor.double() ** 2).sum() for tensor in tree.values()) ** 0.5)


def not_finite(state: State) -> str | None:
    """Return the part/name of the first tensor that holds a NaN or an infinity."""
    for part, tree in state.items():
        for name, tensor in tree.items():
            if not torch.isfinite(tensor).all():
                return f"{part}/{name}"
    return None


def difference(got: State, expected: State) -> str | None:
    """Say in words how two states differ in parts, names, shapes or types; None where they agree."""
    flat_got, flat_expected = flatten(got), flatten(expected)
    for name in sorted(flat_got.keys() ^ flat_expected.keys()):
        return f"{name} is {'not expected' if name in flat_got else 'missing'}"
    for name, tensor in flat_got.items():
        wanted = flat_expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            return (
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {tuple(wanted.shape)} {wanted.dtype} as expected"
            )
    return None


def shaped_as(state: State, other: State) -> State:
    """Return a state's names and types with the shapes of another one where that has as many axes."""
    return {
        part: {
            name: tensor.new_empty(other[part][name].shape)
            if name in other.get(part, {}) and other[part][name].dim() == tensor.dim()
            else tensor
            for name, tensor in tree.items()
        }
        for part, tree in state.items()
    }


def moved(state: State, start: State, sign: float) -> State:
    """Return state + sign * start for the tensors that the start has; raise RunError where their shapes differ."""
    result: State = {}
    for part, tree in state.items():
        known, result[part] = start.get(part, {}), dict(tree)
        for name in tree.keys() & known.keys():
            if tree[name].shape != known[name].shape:
                raise RunError(f"{part}/{name} has another shape than what was sent, so there is no difference")
            result[part][name] = torch.add(tree[name], known[name], alpha=sign)
    return result


def flatten(state: State) -> Tensors:
    """Return a state as one level of names, part/name, in name order."""
    return {f"{part}/{name}": state[part][name] for part in sorted(state) for name in sorted(state[part])}


def unflatten(flat: Tensors) -> State:
    """Undo `flatten`; names come out in order, whatever order a file was read in."""
    state: State = {}
    for name, tensor in sorted(flat.items()):
        part, _, rest = name.partition("/")
        state.setdefault(part, {})[rest] = tensor
    return state


def digest(state: State) -> str:
    """Return a SHA-256 over names, shapes, types and values."""
    found = hashlib.sha256()
    for name, tensor in flatten(state).items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def joined(state: State) -> Tensor:
    """Return all numbers of a state as one vector, in name order."""
    flat = [tensor.reshape(-1) for tensor in flatten(state).values()]
    return torch.cat(flat) if flat else torch.zeros(0)


def parted(vector: Tensor, form: State) -> State:
    """Undo `joined`, for a state of this form."""
    flat = flatten(form)
    pieces = vector.split([tensor.numel() for tensor in flat.values()])
    return unflatten({name: piece.view(flat[name].shape) for name, piece in zip(flat, pieces, strict=True)})


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision numbers as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
