"""What clients keep between rounds, on disk: one safetensors file for each client and round."""

import os
from dataclasses import dataclass
from pathlib import Path

from weft.core import trees
from weft.core.errors import RunError
from weft.core.points import point
from weft.core.types import State


@dataclass(frozen=True)
class Memory:
    """A folder of client memories.

    A memory is on disk before the reply leaves, under the round that made it. The server says which round of a
    client it last counted; that memory is the valid one, whatever else was written before a crash.
    """

    folder: Path

    def load(self, client: str, round_: int) -> State:
        """Return what a client kept in a round."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(client, round_)
        try:
            return trees.unflatten(load_file(path))
        except (OSError, SafetensorError):
            raise RunError(f"client {client}: its memory of round {round_} ({path}) is missing or damaged") from None

    def save(self, client: str, round_: int, kept: State, since: int) -> None:
        """Write a memory durably, then forget those that can no longer be asked for."""
        from safetensors.torch import save

        from weft.files import make_folder, write_safely

        path = self._path(client, round_)
        make_folder(path.parent)
        write_safely(path, save(trees.flatten(kept)))
        for old in path.parent.glob("*.safetensors"):
            if int(old.stem) not in (since, round_):
                point(f"forget:{old.name}")
                os.unlink(old)

    def _path(self, client: str, round_: int) -> Path:
        return self.folder / client / f"{round_:06d}.safetensors"
