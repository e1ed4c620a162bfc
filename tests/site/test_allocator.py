"""A step's memory stays in the process, whose pages are not cleared again; pieces of messages leave no holes."""

import subprocess
import sys
from pathlib import Path

import pytest

from weft.site import allocator

PROBE = """
import ctypes, resource, runpy, sys
kept = len(sys.argv) > 2 and runpy.run_path(sys.argv[1])["keep_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, size = ctypes.c_void_p, [ctypes.c_void_p], 8 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(6)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

HOLES = """
import ctypes, runpy, sys
given_back = len(sys.argv) > 2 and runpy.run_path(sys.argv[1])["return_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, size = ctypes.c_void_p, [ctypes.c_void_p], 5 << 20
libc.free(libc.malloc(ctypes.c_size_t(size)))
pieces = []
for _ in range(20):
    pieces.append(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(pieces[-1], 1, size)
    ctypes.memset(libc.malloc(ctypes.c_size_t(1 << 16)), 1, 1 << 16)
for piece in pieces:
    libc.free(piece)
print(int(open("/proc/self/statm").read().split()[1]) * 4096)
"""


def faults(*arguments: str) -> int:
    """Return the page faults of eight steps, each of six times 8 MB, in a process of its own."""
    return printed(PROBE, *arguments)


def printed(code: str, *arguments: str) -> int:
    """Return the number that a process of its own prints."""
    command = [sys.executable, "-c", code, str(Path(allocator.__file__)), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_that_is_freed_is_not_cleared_again() -> None:
    """Eight steps cost the faults of one; negative control: without, each costs its own."""
    if not allocator.keep_freed_memory():
        pytest.skip("not glibc")
    assert 4 * faults("kept") < faults()


def test_pieces_of_messages_go_back() -> None:
    """Twenty pieces of 5 MB, each with something small behind it that stays; control: glibc's own way keeps them."""
    if not allocator.return_freed_memory() or not Path("/proc/self/statm").is_file():
        pytest.skip("not glibc on Linux")
    allocator.keep_freed_memory()
    assert printed(HOLES) - printed(HOLES, "given back") > 50 << 20
