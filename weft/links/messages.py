"""Orders and replies as whole messages: what is counted is what would travel, to the byte, metadata included.

    "WEFT" | version, 4 bytes | length of the head, 8 | length of the body, 8 | head, JSON | body, safetensors

A client gets an order of its own: its name, its `since`, the cohort, the state. Numbers of the head that are not whole
have 8 bytes as 16 hexadecimal digits, so that a message is as long in every run.
"""

import base64
import json
import struct
from collections.abc import Mapping
from typing import Any

from weft.core.errors import RunError
from weft.core.types import Metrics, Order, Reply
from weft.links import wire

MAGIC, VERSION = b"WEFT", 1
_FRAME = struct.Struct("<4sIQQ")


def front(head: Mapping[str, Any], body: bytes) -> bytes:
    """Return what stands before a body."""
    text = json.dumps(head, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    return _FRAME.pack(MAGIC, VERSION, len(text), len(body)) + text


def opened(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Return head and body; raise RunError for what is no message."""
    try:
        magic, version, head, body = _FRAME.unpack_from(message)
    except struct.error:
        magic, version, head, body = b"", 0, 0, 0
    if (magic, version) != (MAGIC, VERSION) or len(message) != _FRAME.size + head + body:
        raise RunError("a message is damaged: its beginning does not fit its length")
    start = _FRAME.size + head
    return json.loads(message[_FRAME.size : start]), message[start:]


def order_head(order: Order, client: str) -> dict[str, Any]:
    """Return the head of the order that one client gets; what its masks need stands there as base64."""
    needed = order.secure.get(client)
    return {
        **({"secure": base64.b64encode(needed).decode()} if needed else {}),
        **({} if order.length is None else {"length": _hex(order.length)}),
        "kind": order.kind,
        "round": order.round,
        "client": client,
        "since": order.since.get(client, 0),
        "metrics": list(order.metrics),
        "cohort": list(order.cohort),
    }


def order_of(message: bytes) -> Order:
    """Return the order of one client."""
    head, body = opened(message)
    client = head.pop("client")
    since, metrics, cohort = {client: head.pop("since")}, tuple(head.pop("metrics")), tuple(head.pop("cohort"))
    secure = {client: base64.b64decode(head.pop("secure"), validate=True)} if "secure" in head else {}
    if "length" in head:
        head["length"] = _number(head["length"])
    state = wire.unpack(body)
    return Order(**head, clients=(client,), state=state, since=since, metrics=metrics, cohort=cohort, secure=secure)


def reply_head(reply: Reply) -> dict[str, Any]:
    """Return the head of a reply."""
    return {
        "client": reply.client,
        "round": reply.round,
        "weight": reply.weight,
        "examples": reply.examples,
        "metrics": _written(reply.metrics),
        "measured": {group: _written(sums) for group, sums in reply.measured.items()},
        "failure": reply.failure,
        "not_finite": reply.not_finite,
    }


def reply_of(message: bytes) -> Reply:
    """Return a reply."""
    head, body = opened(message)
    head["metrics"] = _read(head["metrics"])
    head["measured"] = {group: _read(sums) for group, sums in head["measured"].items()}
    return Reply(**head, update=wire.unpack(body))


def _written(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: _hex(value) for name, value in metrics.items()}


def _read(metrics: Mapping[str, str]) -> Metrics:
    return {name: _number(value) for name, value in metrics.items()}


def _hex(value: float) -> str:
    return struct.pack("<d", value).hex()


def _number(text: str) -> float:
    value: float = struct.unpack("<d", bytes.fromhex(text))[0]
    return value
