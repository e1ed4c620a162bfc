"""A site's secret: privacy noise and private sampling come from it, and never from the job's seed, which is public.

Numbers come out of SHAKE-256 over the secret and an address. torch's generator on a processor starts from 32 bits,
which can all be tried, so it draws nothing here. The same address gives the same numbers: a round that is done again
after a crash releases the same bytes, and there is no second noise to average with the first.
"""

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from weft.core.errors import PolicyError
from weft.files import make_folder, write_safely

LENGTH = 32  # bytes
PURPOSE = "weft private draws 1"


@dataclass(frozen=True)
class Secret:
    """Bytes that never leave a site."""

    key: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """Return a name that tells two secrets apart and gives nothing of them away."""
        return hashlib.sha256(b"weft name of a secret" + self.key).hexdigest()[:16]

    def uniform(self, count: int, *address: str | int) -> Tensor:
        """Return float64 numbers in [0, 1), multiples of 2**-53."""
        text = json.dumps([PURPOSE, *address], separators=(",", ":"))
        drawn = hashlib.shake_256(self.key + text.encode()).digest(8 * count)
        words = torch.frombuffer(bytearray(drawn), dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
        return (words >> 11 & (2**53 - 1)).double() * 2.0**-53

    def normal(self, count: int, *address: str | int) -> Tensor:
        """Return standard normal float64 numbers (Box and Muller 1958)."""
        half = (count + 1) // 2
        first, second = self.uniform(2 * half, *address).view(2, half)
        radius, angle = (-2 * torch.log1p(-first)).sqrt(), 2 * math.pi * second
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def secret_of(folder: Path) -> Secret:
    """Return the secret in a folder, made on first use, which its owner alone may read.

    Raise PolicyError where others may read it, or where it is damaged: with another secret the noise would be new.
    """
    path = folder / "secret"
    if not path.exists():
        make_folder(path.parent)
        write_safely(path, os.urandom(LENGTH), private=True)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise PolicyError(f"{path}: others may read this site's secret; run `chmod 600 {path}`")
    key = path.read_bytes()
    if len(key) != LENGTH:
        raise PolicyError(f"{path}: this site's secret is damaged; start the run again in another folder")
    return Secret(key)
