"""SHA-256 of several parts, and parts end to end, each with its length: no two lists of parts give the same bytes."""

import hashlib

Buffer = bytes | memoryview


def joined(*parts: bytes) -> bytes:
    """Return the parts with their lengths before them, so that no two lists give the same bytes.

    >>> joined(b"ab", b"c") == joined(b"a", b"bc")
    False
    """
    return b"".join(len(part).to_bytes(8) + part for part in parts)


def digest(*parts: Buffer) -> bytes:
    """Return SHA-256 over the parts, each with its length; a part may be a large array."""
    result = hashlib.sha256()
    for part in parts:
        result.update(memoryview(part).nbytes.to_bytes(8))
        result.update(part)
    return result.digest()
