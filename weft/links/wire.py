"""States as bytes: safetensors, no pickle, the same bytes in simulation and between real sites."""

from weft.core import trees
from weft.core.errors import RunError
from weft.core.types import State
from weft.links.thin import thick, thin


def pack(state: State) -> bytes:
    """Return a state as safetensors bytes, names in order."""
    from safetensors.torch import save

    content: bytes = save(thin(trees.flatten(state)))
    return content


def unpack(content: bytes) -> State:
    """Undo `pack`; raise RunError for bytes that are no safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return trees.unflatten(thick(load(content)))
    except (SafetensorError, ValueError) as error:
        raise RunError(f"a message is damaged: {error}") from None
