"""Keep the memory that a training step frees: glibc gives large blocks back, and each step has its pages cleared anew.

A block's activations pass glibc's threshold for blocks of their own; asked for at every step, their pages cost 10 to
25 % of a step's processor time. The largest still go back: kept, they leave holes that no later block of clients fits.
Other allocators, and other systems, are left as they are.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
LARGEST, MOST = 32 << 20, 64 << 20  # bytes that are kept in one piece, and at the end of the heap


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next step; tell whether the system can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no mallopt (musl, macOS); no handle of the process itself (Windows)
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, MOST))
