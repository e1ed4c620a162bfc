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


def joined(content: Any) -> bytes:
    """Return the message of a record; raise ValueError for a record of another kind."""
    try:
        return b"".join(bytes(content[part]["bytes"].data) for part in ("front", "body"))
    except (KeyError, TypeError, AttributeError):
        raise ValueError("a record is no message of Weft") from None


def most_objects(most_bytes: int) -> int:
    """Return how many objects a message of at most so many bytes is cut into."""
    return most_bytes // CHUNK + _SPARE
