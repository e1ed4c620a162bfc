"""A step's memory stays in the process: asked for again, its pages are not cleared again."""

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


def faults(*arguments: str) -> int:
    """Return the page faults of eight steps, each of six times 8 MB, in a process of its own."""
    command = [sys.executable, "-c", PROBE, str(Path(allocator.__file__)), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_that_is_freed_is_not_cleared_again() -> None:
    """Eight steps cost the faults of one; negative control: without, each costs its own."""
    if not allocator.keep_freed_memory():
        pytest.skip("not glibc")
    assert 4 * faults("kept") < faults()
