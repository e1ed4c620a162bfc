"""What becomes of freed memory: kept for the next training step, given back where messages come and go.

A block's activations pass glibc's threshold for blocks of their own; asked for at every step, their pages cost 10 to
25 % of a step's processor time. The largest still go back: kept, they leave holes that no later block of clients fits.
Where activations are computed again to save memory, those of one layer would leave holes that the small ones between
layers cut up, half as much again as what lives; there more goes back, for a few percent of the time.
A coordinator trains nothing; there glibc's own way, to keep blocks of a size that it has seen freed, leaves holes
between the pieces of messages. Other allocators, and other systems, are left as they are.

torch asks for aligned memory, and glibc cuts a sliver off at both ends to align it. Slivers that it keeps for small
requests (its caches do) never join their block again, which is then too small by them for the next request of the very
same size: a quarter of what a process held was such holes. The caches can be set when a process begins alone, so the
command `weft` begins again with them off; and with one heap for all threads, where each would keep holes of its own.
"""

import ctypes
import os
import sys
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
LARGEST, MOST = 32 << 20, 64 << 20  # bytes that are kept in one piece, and at the end of the heap
SPARING = 4 << 20  # bytes that are kept in one piece where memory counts more than time
TUNED = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.arena_max=1"
PIECE = 1 << 20  # bytes; a piece of a message that is larger goes back at once


def tuned(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a process of Weft begins; what it says of glibc's malloc itself stays valid.

    >>> tuned({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"})["GLIBC_TUNABLES"].removeprefix(TUNED)
    ':glibc.malloc.arena_max=4'
    """
    own = environment.get("GLIBC_TUNABLES", "")
    return {**environment, "GLIBC_TUNABLES": own if TUNED in own else ":".join(filter(None, [TUNED, own]))}


def begin_again() -> None:
    """Replace this process by itself in a tuned environment, where the system is one of glibc; once."""
    glibc = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
    secure = sys.platform != "win32" and os.getuid() != os.geteuid()  # there glibc listens to no environment
    environment = tuned(os.environ)
    if glibc and not secure and sys.executable and environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def release() -> None:
    """Give back what is free in the heap now: loading leaves holes that no activation fits."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def keep_freed_memory(*, sparing: bool = False) -> bool:
    """Let this process keep what it frees for its next step, small pieces alone if sparing; tell if the system can."""
    return _set(SPARING if sparing else LARGEST, MOST)


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
