"""How much is trained at once beside the base: no more memory than the base takes, or 1 GiB.

The machine is not asked what it has free: blocks, and with them the last digits, would differ from run to run.
"""

from weft.site.model import Loaded

LEAST = 1 << 30  # bytes
COPIES = 4  # of each client's adapter: itself, its gradient, two moments
KEPT = 20  # numbers of a token that a layer of a transformer keeps for its gradient, in hidden sizes


def fitting(loaded: Loaded) -> int:
    """Return how many clients' adapters with gradients and moments fit."""
    own = sum(value.nbytes for value in loaded.initial.values())
    return max(1, _room(loaded) // (COPIES * max(1, own)))


def abreast(loaded: Loaded, tokens: int) -> int:
    """Return how many steps of so many tokens fit side by side, by what a transformer of this shape keeps of them."""
    config = loaded.net.config.get_text_config()
    layers, hidden, words = (
        int(getattr(config, name, 1)) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    return max(1, _room(loaded) // (4 * tokens * (KEPT * layers * hidden + words)))


def _room(loaded: Loaded) -> int:
    return max(LEAST, sum(int(value.nbytes) for value in loaded.net.parameters()))
