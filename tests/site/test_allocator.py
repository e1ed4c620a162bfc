"""A step's memory stays in the process, whose pages are not cleared again; pieces of messages leave no holes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.site import allocator

PROBE = """
import ctypes, resource, runpy, sys
kept = len(sys.argv) > 2 and runpy.run_path(sys.argv[1])["keep_freed_memory"](sparing=len(sys.argv) > 3)
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


AGAIN = """
import os, runpy, sys
here = runpy.run_path(sys.argv[1])
print(os.environ.get("TIMES", ""), file=sys.stderr)
os.environ["TIMES"] = os.environ.get("TIMES", "") + "I"
here["begin_again"]()
print(len(os.environ["TIMES"]), file=sys.stderr)
print(int(here["TUNED"] in os.environ["GLIBC_TUNABLES"] and sys.argv[2] == "a word"))
"""

SLIVERS = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallopt(-3, 32 << 20), libc.mallopt(-1, 1 << 30)  # as keep_freed_memory does
def tensor():
    place = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(1 << 20))
    return place
def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * 4096
seen = []
for step in range(40):
    kept, nodes = [], []
    for layer in range(50):
        passing = tensor()
        nodes += [libc.malloc(ctypes.c_size_t(size)) for size in (24, 40, 56, 72, 88, 104)]
        kept.append(tensor())
        libc.free(passing)
    seen.append(mapped())
    for place in [*kept, *nodes]:
        libc.free(place)
print(seen[-1] - seen[0])
"""


def faults(*arguments: str) -> int:
    """Return the page faults of eight steps, each of six times 8 MB, in a process of its own."""
    return printed(PROBE, *arguments)


def printed(code: str, *arguments: str) -> int:
    """Return the number that a process of its own prints."""
    command = [sys.executable, "-c", code, str(Path(allocator.__file__)), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_that_is_freed_is_not_cleared_again() -> None:
    """Eight steps cost the faults of one; negative controls: without, or where it spares memory, each costs its own."""
    if not allocator.keep_freed_memory():
        pytest.skip("not glibc")
    assert 4 * faults("kept") < faults()
    assert 4 * faults("kept") < faults("kept", "sparing")


def test_pieces_of_messages_go_back() -> None:
    """Twenty pieces of 5 MB, each with something small behind it that stays; control: glibc's own way keeps them."""
    if not allocator.return_freed_memory() or not Path("/proc/self/statm").is_file():
        pytest.skip("not glibc on Linux")
    allocator.keep_freed_memory()
    assert printed(HOLES) - printed(HOLES, "given back") > 50 << 20


def test_slivers_do_not_spoil_a_freed_block() -> None:
    """Forty equal steps of fifty layers that keep 1 MB each: the heap does not grow; control: with caches it does."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        pytest.skip("not glibc on Linux")
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    grown = [
        int(subprocess.run([sys.executable, "-c", SLIVERS], check=True, capture_output=True, env=environment).stdout)
        for environment in (plain, allocator.tuned(plain))
    ]
    assert grown[1] < 1 << 20 <= grown[0]


def test_a_process_begins_again_once() -> None:
    """With its own words; control: where the caches are off already it goes on."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        pytest.skip("not glibc on Linux")
    command = [sys.executable, "-c", AGAIN, str(Path(allocator.__file__)), "a word"]
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for environment, begun in ((plain, "2"), (allocator.tuned(plain), "1")):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert (done.stdout.strip(), done.stderr.split()[-1]) == ("1", begun)
