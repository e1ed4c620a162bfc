"""States and messages as bytes: safetensors, no pickle, the same bytes in simulation and between real sites.

A message is a tree of dict, list, tuple, str, int, float, bool, None, bytes and Tensor:

    "WEFT" | version, 4 bytes | length of the head, 8 | length of the body, 8 | head, JSON | body, safetensors

The head is the tree with a place holder for each tensor; the body holds the tensors, in any dtype, bfloat16 too, and
those that are mostly zeros without their zeros. A number that is not whole has 8 bytes as 16 hexadecimal digits, so
that a message is as long in every run. Both lengths are known and compared before anything is parsed, and nothing is
ever unpacked beyond them.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.core import trees
from weft.core.errors import RunError
from weft.core.types import State
from weft.links.thin import thick, thin

MAGIC, VERSION = b"WEFT", 2
_FRAME = struct.Struct("<4sIQQ")
_MOST_HEAD = 64 << 20  # bytes
_DEEPEST = 32  # nested levels of a tree
_DIGITS = frozenset("0123456789abcdef")
_MARK = "$"  # the key of a place holder; no dict of a message has it


def pack(state: State) -> bytes:
    """Return a state as safetensors bytes, names in order."""
    from safetensors.torch import save

    content: bytes = save(thin(trees.flatten(state)))
    return content


def unpack(content: bytes) -> State:
    """Undo `pack`; raise RunError for bytes that are no safetensors."""
    return trees.unflatten(thick(_tensors(content)))


def _tensors(content: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"a message is damaged: {error}") from None
    return tensors


def seal(tree: Any) -> bytes:
    """Return a tree as one message; raise TypeError for what no message may hold."""
    tensors: dict[str, Tensor] = {}
    head = _head(_lower(tree, tensors))
    body = _body(tensors)
    return b"".join((_FRAME.pack(MAGIC, VERSION, len(head), len(body)), head, body))


@dataclass(frozen=True)
class Shared:
    """What many messages have in common, sealed once: each has a beginning of its own, and after it the one body."""

    common: bytes
    """The head without its end."""
    body: bytes

    def front(self, own: Mapping[str, Any]) -> bytes:
        """Return the beginning of the message {**common, **own}; `own` holds some keys, other ones, and no tensors."""
        rest = _head(own)[1:]
        size = _FRAME.pack(MAGIC, VERSION, len(self.common) + 1 + len(rest), len(self.body))
        return b"".join((size, self.common, b",", rest))


def share(common: Mapping[str, Any]) -> Shared:
    """Seal what many messages have in common."""
    tensors: dict[str, Tensor] = {}
    head = _head(_lower(common, tensors))
    return Shared(head[:-1], _body(tensors))


def _head(lowered: Any) -> bytes:
    return json.dumps(lowered, separators=(",", ":"), allow_nan=False).encode()


def _body(tensors: dict[str, Tensor]) -> bytes:
    """Return tensors as safetensors, each with storage of its own where another one shares it."""
    from safetensors.torch import save

    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensors[name].data_ptr())
    content: bytes = save(thin(tensors))
    return content


def unseal(content: bytes) -> Any:
    """Undo `seal`; raise RunError for bytes that are not one whole message of this version."""
    head, body = _parts(content)
    try:
        shape = json.loads(head)
    except (ValueError, RecursionError):
        raise RunError("a message is damaged: its head is no JSON") from None
    tensors = thick(_tensors(body))
    tree = _raise(shape, tensors, 0)
    if tensors:
        raise RunError(f"a message is damaged: nothing refers to its tensor {next(iter(tensors))}")
    return tree


def _parts(content: bytes) -> tuple[bytes, bytes]:
    """Check the frame against the size before anything else; return head and body."""
    if len(content) < _FRAME.size or content[:4] != MAGIC:
        raise RunError("a message is damaged: it does not begin like one of Weft")
    _, version, head, body = _FRAME.unpack_from(content)
    if version != VERSION:
        raise RunError(f"a message has format {version}, and this Weft reads {VERSION}; install the same version")
    if head > _MOST_HEAD or _FRAME.size + head + body != len(content):
        raise RunError(f"a message is damaged: it has {len(content)} bytes and not the {head} + {body} that it says")
    start = _FRAME.size + head
    return content[_FRAME.size : start], content[start:]


def _lower(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Replace what JSON cannot hold by place holders."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return {_MARK: struct.pack(">d", value).hex()}
    if isinstance(value, bytes | bytearray):
        held = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
        return {_MARK: ["bytes", _keep(held, tensors)]}
    if isinstance(value, Tensor):
        return {_MARK: _keep(value.detach().cpu().contiguous(), tensors)}
    if isinstance(value, tuple):
        return {_MARK: ["tuple", [_lower(item, tensors) for item in value]]}
    if isinstance(value, list):
        return [_lower(item, tensors) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) and key != _MARK for key in value):
        return {key: _lower(item, tensors) for key, item in value.items()}
    raise TypeError(f"a message cannot hold {type(value).__name__}, or a key that is not text")


def _keep(tensor: Tensor, tensors: dict[str, Tensor]) -> int:
    """Add a tensor under its number."""
    number = len(tensors)
    tensors[str(number)] = tensor
    return number


def _raise(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """Put tensors and the like back in place of their place holders, each once."""
    if depth > _DEEPEST:
        raise RunError(f"a message is damaged: it is nested deeper than {_DEEPEST} levels")
    if isinstance(value, list):
        return [_raise(item, tensors, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value:
        return {key: _raise(item, tensors, depth + 1) for key, item in value.items()}
    return _held(value[_MARK], tensors, depth)


def _held(place: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """Return what a place holder stands for: text for a float, a number for a tensor, a list for all else."""
    if isinstance(place, str) and len(place) == 16 and not set(place) - _DIGITS:
        return struct.unpack(">d", bytes.fromhex(place))[0]
    kind, content = place if isinstance(place, list) and len(place) == 2 else ("tensor", place)
    if kind == "tuple" and isinstance(content, list):
        return tuple(_raise(item, tensors, depth + 1) for item in content)
    if kind not in ("tensor", "bytes") or type(content) is not int or str(content) not in tensors:
        raise RunError("a message is damaged: a place holder in its head points nowhere")
    tensor = tensors.pop(str(content))
    return tensor if kind == "tensor" else tensor.numpy().tobytes()
