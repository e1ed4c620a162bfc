"""Keep the memory that a training step frees: glibc gives large blocks back, and each step has its pages cleared anew.

A block's activations pass glibc's threshold for blocks of their own; asked for at every step, their pages cost 10 to
25 % of a step's processor time. Other allocators, and other systems, are left as they are.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of mallopt(3)


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next step; tell whether the system can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no mallopt (musl, macOS); no handle of the process itself (Windows)
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))  # -1: never
