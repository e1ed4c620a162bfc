"""What becomes of freed memory: kept for the next training step, given back where messages come and go.

A block's activations pass glibc's threshold for blocks of their own; asked for at every step, their pages cost 10 to
25 % of a step's processor time. The largest still go back: kept, they leave holes that no later block of clients fits.
A coordinator trains nothing; there glibc's own way, to keep blocks of a size that it has seen freed, leaves holes
between the pieces of messages. Other allocators, and other systems, are left as they are.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
LARGEST, MOST = 32 << 20, 64 << 20  # bytes that are kept in one piece, and at the end of the heap
PIECE = 1 << 20  # bytes; a piece of a message that is larger goes back at once


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next step; tell whether the system can."""
    return _set(LARGEST, MOST)


def return_freed_memory() -> bool:
    """Let this process give back each piece of a message that it frees; tell whether the system can."""
    return _set(PIECE, PIECE)


def _set(alone: int, kept: int) -> bool:
    """Set the bytes from which a block stands alone and goes back when freed, and those kept at the heap's end."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no mallopt (musl, macOS); no handle of the process itself (Windows)
        return False
    return bool(mallopt(_MMAP_THRESHOLD, alone) and mallopt(_TRIM_THRESHOLD, kept))
