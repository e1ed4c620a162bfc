"""What one client sends and receives in a round under the job's algorithm, from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.core import trees
from weft.core.types import Algorithm, State, Tensors
from weft.plan.counts import Shapes, message, whole


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client's tensors in one round; the head of a message, some hundred bytes, comes on top."""

    up: int
    down: int
    note: str = ""


def traffic(algorithm: Algorithm, shapes: Shapes, pipeline: Sequence[str]) -> Traffic:
    """Return the bytes of a client's round, before what the pipeline makes of them."""
    try:
        up, down = _halves(algorithm, shapes)
        note = ""
    except Exception:  # a rule that looks at values has none to look at here
        up, down, note = (
            whole(shapes),
            whole(shapes),
            "the algorithm decides while it trains what it sends; a whole adapter is shown",
        )
    other = [name for name in pipeline if name != "weigh"]
    if other:
        note = "; ".join(filter(None, [note, f"before {', '.join(other)} of the pipeline"]))
    return Traffic(up, down, note)


def _halves(algorithm: Algorithm, shapes: Shapes) -> tuple[int, int]:
    """Let the algorithm's own client half run on tensors without values, and count what it sends."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        first = {name: torch.zeros(shape) for name, shape in shapes.items()}
        state = algorithm.init(first)
        sent = {part: state[part] for part in algorithm.sends}
        update, _ = algorithm.client(
            _idle(first),  # has what a client half asks of its work
            trees.expand_state(sent, 1),
            trees.expand_state(algorithm.keep(first), 1),
        )
        update = algorithm.cut(trees.pick_state(update, 0))
        return _size(update), _size(sent)


def _size(state: State) -> int:
    return message({name: tuple(tensor.shape) for name, tensor in trees.flatten(state).items()})


def _idle(first: Tensors) -> SimpleNamespace:
    """Return the work of a client that trains nothing."""
    return SimpleNamespace(
        clients=("client",),
        examples=torch.ones(1, dtype=torch.long),
        steps=torch.ones(1, dtype=torch.long),
        ranks=torch.zeros(1, dtype=torch.long),
        initial=trees.expand(first, 1),
        round=1,
        lr=1e-3,
        momentum=0.0,
        draw=lambda name, shape: torch.zeros(1, *shape),
        train=lambda start, gradient=None: start,
    )
