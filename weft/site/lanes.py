"""Which rows of a batch belong to which client while a block is in the model."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Lanes:
    """The rows of the batch that is in the model now.

    Padded: `clients` times the same number of rows, those of one client beside each other. Packed: all tokens of all
    examples in one row, `tokens` of each client, `lengths` of each example. `seeds` starts each client's own draws.
    """

    clients: int = 1
    rows: int = 0
    """Padded: rows of all clients together; 0 while packed."""
    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    selected: list[int] = field(default_factory=list)
    """Positions of each client that the output layer is applied to."""
    seeds: list[int] = field(default_factory=list)
    own: list[tuple[int, int]] = field(default_factory=list)
    """Padded: each client's own number of rows and longest row."""

    @property
    def packed(self) -> bool:
        """Tell whether all tokens stand in one row."""
        return self.rows == 0

    def split(self, x: Tensor) -> list[Tensor]:
        """Cut a module's input into one piece a client; raise NotImplementedError for rows that are not the block's.

        The check is what makes lifting safe: a module that sees something else, such as one table of positions
        shared by all rows, must never be cut by client.
        """
        if self.padded(x):
            return list(x.chunk(self.clients))
        flat = x[0] if self.packed and len(x) == 1 and x.dim() > 2 else x.flatten(0, -2)  # (tokens, heads, size) too
        for sizes in (self.tokens, self.selected):
            if sizes and len(flat) == sum(sizes):
                return list(flat.split(sizes))
        have = f"{self.rows} rows" if self.rows else f"{sum(self.tokens)} tokens"
        raise NotImplementedError(f"an input of shape {tuple(x.shape)} reaches a trained layer, the block has {have}")

    def padded(self, x: Tensor) -> bool:
        """Tell whether an input has the padded rows of the block, equally many for each client."""
        return self.rows > 0 and (x.shape[0] == self.rows or self.flat(x))

    def flat(self, x: Tensor) -> bool:
        """Tell whether an input has the padded rows laid end to end, (rows * longest, size), as OPT's layers do."""
        return x.dim() == 2 and bool(self.own) and x.shape[0] == self.rows * max(longest for _, longest in self.own)

    def join(self, pieces: list[Tensor], like: Tensor) -> Tensor:
        """Undo `split`: the leading axes of `like`, the last axis of the pieces."""
        return self.joined(torch.cat(pieces), like)

    def joined(self, whole: Tensor, like: Tensor) -> Tensor:
        """Give pieces that are one after another the leading axes of `like`."""
        return whole if self.padded(like) else whole.view(*like.shape[:-1], whole.shape[-1])
