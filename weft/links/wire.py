"""States and messages as bytes: safetensors, no pickle, the same bytes in simulation and between real sites.

A message is a tree of dict, list, tuple, str, int, float, bool, None, bytes and Tensor:

    "WEFT" | version, 4 bytes | length of the head, 8 | length of the body, 8 | head, JSON | body, safetensors

The head is the tree with a place holder for each tensor; the body holds the tensors, in any dtype, bfloat16 too.
Both lengths are known and compared before anything is parsed, and nothing is ever unpacked beyond them.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.core import trees
from weft.core.errors import RunError
from weft.core.types import State
from weft.links.thin import thick, thin

MAGIC, VERSION = b"WEFT", 1
_FRAME = struct.Struct("<4sIQQ")
_MOST_HEAD = 64 << 20  # bytes
_DEEPEST = 32  # nested levels of a tree
_MARK = "$"  # the key of a place holder; no dict of a message has it
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


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
    from safetensors.torch import save

    tensors: dict[int, Tensor] = {}
    head = json.dumps(_lower(tree, tensors), separators=(",", ":"), allow_nan=False).encode()
    body = save(_numbered(tensors))
    return b"".join((_FRAME.pack(MAGIC, VERSION, len(head), len(body)), head, body))


def seal_each(common: dict[str, Any], own: Mapping[str, dict[str, Any]]) -> tuple[dict[str, bytes], bytes]:
    """Seal {**common, **own[name]} for every name: return the beginnings, and the one body that all of them share.

    `own` holds no tensors. A beginning and the body, one after the other, are the message.
    """
    from safetensors.torch import save

    tensors: dict[int, Tensor] = {}
    lowered = _lower(common, tensors)
    body = save(_numbered(tensors))
    fronts = {}
    for name, tree in own.items():
        head = json.dumps({**lowered, **tree}, separators=(",", ":"), allow_nan=False).encode()
        fronts[name] = _FRAME.pack(MAGIC, VERSION, len(head), len(body)) + head
    return fronts, body


def unseal(content: bytes) -> Any:
    """Undo `seal`; raise RunError for bytes that are not one whole message of this version."""
    head, body = _parts(content)
    try:
        shape = json.loads(head)
    except (ValueError, RecursionError):
        raise RunError("a message is damaged: its head is no JSON") from None
    tensors = _tensors(body)
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


def _lower(value: Any, tensors: dict[int, Tensor]) -> Any:
    """Replace what JSON cannot hold by place holders."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_MARK: ["float", str(value)]}
    if isinstance(value, bytes | bytearray):
        held = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
        return {_MARK: ["bytes", _keep(held, tensors)]}
    if isinstance(value, Tensor):
        return {_MARK: ["tensor", _keep(value.detach().cpu().contiguous(), tensors)]}
    if isinstance(value, tuple):
        return {_MARK: ["tuple", [_lower(item, tensors) for item in value]]}
    if isinstance(value, list):
        return [_lower(item, tensors) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) and key != _MARK for key in value):
        return {key: _lower(item, tensors) for key, item in value.items()}
    raise TypeError(f"a message cannot hold {type(value).__name__}, or a key that is not text")


def _keep(tensor: Tensor, tensors: dict[int, Tensor]) -> int:
    """Add a tensor under its address, with storage of its own where another one shares it; return its number."""
    held = tensor.clone() if tensor.numel() and tensor.data_ptr() in tensors else tensor
    tensors[held.data_ptr() if held.numel() else -1 - len(tensors)] = held  # an empty one has no address
    return len(tensors) - 1


def _numbered(tensors: dict[int, Tensor]) -> dict[str, Tensor]:
    return {f"{number:08d}": tensor for number, tensor in enumerate(tensors.values())}


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
    kind, content = value[_MARK] if isinstance(value[_MARK], list) and len(value[_MARK]) == 2 else (None, None)
    if kind == "tuple" and isinstance(content, list):
        return tuple(_raise(item, tensors, depth + 1) for item in content)
    if kind == "float" and content in _FLOATS:
        return _FLOATS[content]
    name = f"{content:08d}" if isinstance(content, int) else ""
    if kind not in ("tensor", "bytes") or name not in tensors:
        raise RunError("a message is damaged: a place holder in its head points nowhere")
    tensor = tensors.pop(name)
    return tensor if kind == "tensor" else tensor.numpy().tobytes()
