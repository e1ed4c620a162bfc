"""How many clients' adapters fit beside the base: large ones, such as `full`, fill a memory before a step is full."""

from weft.site.model import Loaded

LEAST = 1 << 30  # bytes
COPIES = 4  # of each client's adapter: itself, its gradient, two moments


def fitting(loaded: Loaded) -> int:
    """Return how many clients' adapters with gradients and moments take no more than the base, or 1 GiB.

    The machine is not asked what it has free: blocks, and with them the last digits, would differ from run to run.
    """
    base = sum(value.nbytes for value in loaded.net.parameters())
    own = sum(value.nbytes for value in loaded.initial.values())
    return max(1, int(max(LEAST, base) // (COPIES * max(1, own))))
