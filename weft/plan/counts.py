"""What each way of adapting a model would train and send: counted on the meta device, from the config alone."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft import plugins
from weft.core.errors import JobError
from weft.core.task import Task
from weft.core.types import Adapter
from weft.plan.skeleton import layers_of, on_meta, with_layers

COMPARED: tuple[tuple[str, Any], ...] = (
    ("full", "full"),
    ("bottleneck, 64 wide", {"bottleneck": {"size": 64}}),
    ("lora, rank 16, all linear", {"lora": {"rank": 16, "targets": "all-linear"}}),
    ("prefix, 20 tokens", {"prefix": {"tokens": 20}}),
    ("ia3", "ia3"),
    ("bitfit", "bitfit"),
    ("prompt, 20 tokens", {"prompt": {"tokens": 20}}),
)
"""What is shown beside the job's own adapter."""

Shapes = dict[str, tuple[int, ...]]
"""Trainable tensor -> its shape."""


@dataclass(frozen=True)
class Count:
    """What one adapter trains; `reason` says why it cannot."""

    name: str
    trained: int = 0
    total: int = 0
    bytes: int = 0
    """Of one message with the whole adapter, one way: float32 in safetensors; of those compared, to a thousandth."""
    reason: str = ""


def put_on(net: Any, adapter: Adapter, task: Task) -> Any:
    """Return the model with the adapter on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is being renamed
        return adapter.attach(net, task.peft_type, 0)


def shapes_of(net: Any, adapter: Adapter, task: Task) -> Shapes:
    """Return the trainable tensors of an adapter on a model."""
    adapted = put_on(net, adapter, task)
    return {name: tuple(p.shape) for name, p in sorted(adapted.named_parameters()) if p.requires_grad}


def numbers(shapes: Mapping[str, Sequence[int]]) -> int:
    """Return how many numbers tensors of these shapes hold."""
    total = 0
    for shape in shapes.values():
        product = 1
        for size in shape:
            product *= size
        total += product
    return total


def message(shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the bytes of a message that carries float32 tensors of these shapes, as `weft.links.wire` seals them.

    24 bytes of frame, a head of JSON that numbers the tensors, and a safetensors file: 8 bytes, a header of JSON padded
    to a multiple of 8, the numbers. Here 24 + 25 + 8 + 64 + 24.

    >>> message({"adapter/a": (2, 3)})
    145
    """
    tree: dict[str, dict[str, Any]] = {}
    sizes = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        part, _, inside = name.partition("/")
        tree.setdefault(part, {})[inside] = {"$": number}
        sizes[str(number)] = list(shape)
    at, header = 0, {}
    for place in sorted(sizes):
        end = at + 4 * math.prod(sizes[place])
        header[place] = {"dtype": "F32", "shape": sizes[place], "data_offsets": [at, end]}
        at = end
    head, text = (len(json.dumps(held, separators=(",", ":"))) for held in (tree, header))
    return 24 + head + 8 + (text + 7) // 8 * 8 + at


def whole(shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the bytes of a message with a whole adapter."""
    return message({f"adapter/{name}": shape for name, shape in shapes.items()})


def compared(config: Any, task: Task, classes: int) -> Iterator[Count]:
    """Yield the count of each adapter that a job might take."""
    total = sum(p.numel() for p in on_meta(config, task, classes, "float32").parameters())
    alike = _alike(config, task, classes, total)
    for name, choice in COMPARED:
        adapter: Adapter = plugins.build(plugins.parse("adapter", choice), "adapter")
        try:
            yield _count(name, adapter, config, task, classes, total, alike)
        except JobError as error:
            yield Count(name, reason=str(error).removeprefix("adapter: "))


def _alike(config: Any, task: Task, classes: int, total: int) -> bool:
    """Tell whether all layers are alike, so that two small models say what a large one has."""
    if layers_of(config) <= 3:
        return False
    small = [on_meta(with_layers(config, n), task, classes, "float32") for n in (1, 2)]
    sizes = [sum(p.numel() for p in net.parameters()) for net in small]
    return bool(sizes[0] + (layers_of(config) - 1) * (sizes[1] - sizes[0]) == total)


def _count(name: str, adapter: Adapter, config: Any, task: Task, classes: int, total: int, alike: bool) -> Count:
    """Count an adapter on two small models where layers are alike: 70 billion parameters take no longer than 7."""
    if not alike:
        shapes = shapes_of(on_meta(config, task, classes, "float32"), adapter, task)
        return Count(name, numbers(shapes), total, whole(shapes))
    one, two = (shapes_of(on_meta(with_layers(config, n), task, classes, "float32"), adapter, task) for n in (1, 2))
    more = layers_of(config) - 1
    trained = numbers(one) + more * (numbers(two) - numbers(one))
    return Count(name, trained, total, whole(one) + more * (whole(two) - whole(one)))
