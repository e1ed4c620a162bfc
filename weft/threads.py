"""How many threads of the processor compute, and whether every bit is the same on each machine of a kind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TINY = 2_000_000  # parameters


def threads_for(size: int, exact: bool, wanted: int, usual: int) -> int:
    """Return the threads for a base of so many parameters: those that are wanted, if any."""
    return 1 if exact else wanted or (1 if size < TINY else usual)


@contextmanager
def exactly(exact: bool) -> Iterator[None]:
    """Compute with one thread and deterministic kernels, and give the process its own settings back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if exact:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
