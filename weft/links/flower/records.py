"""A message of Weft as a record of Flower and back: one array, cut by Flower into objects of 5 MiB.

One array and not one a tensor: every array of Flower's costs two more requests.
"""

from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

CHUNK = 5 << 20  # bytes of Flower's largest object
_SPARE = 16  # objects of a message beside the chunks of its body


def array(content: bytes) -> ArrayRecord:
    """Wrap bytes; the record may be part of many messages, whose chunks are then held once."""
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(content),), stype="weft", data=content)})


def record(front: bytes, body: ArrayRecord) -> RecordDict:
    """Return a message in two pieces as a record."""
    return RecordDict({"front": array(front), "body": body})


def chunks(body: ArrayRecord) -> set[str]:
    """Return the names of the objects that a body is cut into, each hashed once however often it is sent."""
    return {name for name, _ in body["bytes"].slice_array()}


def joined(content: Any) -> bytes:
    """Return the message of a record, without a copy where it is in one piece; raise ValueError for another kind."""
    try:
        pieces = [piece for part in ("front", "body") if (piece := bytes(content[part]["bytes"].data))]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("a record is no message of Weft") from None


def most_objects(most_bytes: int) -> int:
    """Return how many objects a message of at most so many bytes is cut into."""
    return most_bytes // CHUNK + _SPARE
