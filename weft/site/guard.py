"""What a site refuses to train from: a global adapter further from the first than honest rounds can have taken it.

Where clip bounds every update by C, and the server goes `reach` times their mean, t rounds move the adapter by
t reach C at most. The first adapter comes from the public seed, so a site needs no memory for this. It limits a
dishonest server, and does not remove one: each step may still go that far anywhere.
"""

from weft.core import trees
from weft.core.types import Algorithm, State, Tensors, Wire

ROUNDING = 1e-5  # part of the bound that float32 may add


def bound(algorithm: Algorithm, wire: Wire, rounds: int) -> float | None:
    """Return how far so many rounds can have moved the adapter; None where it is not known."""
    if wire.norm is None or wire.length is not None or wire.noise or not algorithm.reach or algorithm.combine:
        return None
    return rounds * algorithm.reach * wire.norm * (1 + ROUNDING) + ROUNDING


def too_far(received: State, first: Tensors, most: float | None) -> str | None:
    """Say why a site does not train from what it received."""
    adapter = received.get("adapter", {})
    if most is None or set(adapter) - set(first):
        return None
    length = trees.norm({name: value.double() - first[name].double() for name, value in adapter.items()})
    if length <= most:
        return None
    return (
        f"the global adapter is {length:.4g} away from the first one, and clipped updates can have moved it by "
        f"{most:.4g} at most; this site does not train from it"
    )
