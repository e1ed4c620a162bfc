"""Exact discrete Gaussian numbers, many at a time, from a secret key.

Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", algorithms 2 and 3. A coin of chance
exp(-x) is decided as they do it, exactly: 53 random bits settle nearly every coin against exp in float64 with room for
its error, and the rest, about one in 10^11, against as many more bits and digits as it takes. So no rounding of a
float enters a chance. The time that it takes depends on the numbers drawn: an observer who measures it to the
nanosecond is not defended against.
"""

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from math import floor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Truths = NDArray[np.bool_]
MARGIN = 1e-11  # relative error of exp(-x) that is allowed for; float64 has below 1e-14 here
CHUNK = 2**17  # numbers drawn together


class Stream:
    """Random words from a key that is used for nothing else: AES-256 in counter mode."""

    def __init__(self, key: bytes) -> None:
        self.cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return uniform 64-bit words."""
        return np.frombuffer(self.cipher.update(bytes(8 * count)), "<u8")

    def below(self, most: int, count: int) -> Numbers:
        """Return uniform integers from 0 to most - 1, by leaving out what is too large."""
        found = np.empty(0, np.int64)
        while len(found) < count:
            drawn = (self.words(count) & np.uint64((1 << (most - 1).bit_length()) - 1)).astype(np.int64)
            found = np.concatenate([found, drawn[drawn < most]])
        return found[:count]

    def coins(self, about: NDArray[np.float64], exact: Callable[[int], Fraction], margin: float = MARGIN) -> Truths:
        """Toss coins that say yes with chance exp(-x); `about` holds each x in float64, `exact(i)` gives it."""
        drawn = (self.words(len(about)) >> np.uint64(11)).astype(np.float64) * 2.0**-53  # the first 53 bits, exactly
        chance = np.exp(-about)
        room = margin * (1 + about) * chance + 2.0**-52
        yes: Truths = drawn < chance - room
        for place in np.flatnonzero(~yes & (drawn <= chance + room)):
            yes[place] = self._settle(int(drawn[place] * 2.0**53), exact(int(place)))
        return yes

    def _settle(self, bits: int, x: Fraction) -> bool:
        """Decide one coin exactly: draw more bits until they differ from those of exp(-x)."""
        length = 53
        while True:
            bits, length = bits << 64 | int(self.words(1)[0]), length + 64
            with localcontext() as context:
                context.prec = length
                chance = (Decimal(-x.numerator) / Decimal(x.denominator)).exp()
                low, unit = Decimal(bits) / Decimal(2**length), Decimal(2) ** (8 - length)
                if abs(low - chance) > unit:
                    return low < chance


def laplace(stream: Stream, scale: int, count: int) -> Numbers:
    """Return numbers with chances proportional to exp(-|y| / scale)."""
    found = np.empty(0, np.int64)
    while len(found) < count:
        start = stream.below(scale, 2 * (count - len(found)) + 16)
        start = start[stream.coins(start / scale, lambda i, rows=start: Fraction(int(rows[i]), scale))]  # type: ignore[misc]
        value = start + scale * _successes(stream, len(start))
        negative = stream.below(2, len(value)) == 1
        kept = ~(negative & (value == 0))  # zero has one sign
        found = np.concatenate([found, np.where(negative, -value, value)[kept]])
    return found[:count]


def _successes(stream: Stream, count: int) -> Numbers:
    """Return how often a coin of chance 1/e says yes before it says no."""
    total = np.zeros(count, np.int64)
    going = np.arange(count)
    while len(going):
        going = going[stream.coins(np.ones(len(going)), lambda i: Fraction(1))]
        total[going] += 1
    return total


def gaussian(stream: Stream, deviation: float, count: int) -> Numbers:
    """Return numbers with chances proportional to exp(-y^2 / (2 deviation^2)), (count,)."""
    square, scale = Fraction(deviation) ** 2, floor(deviation) + 1

    def accepted(wanted: int) -> Numbers:
        y = laplace(stream, scale, wanted + wanted // 2 + 16)
        about = (np.abs(y) - float(square / scale)) ** 2 / float(2 * square)
        return y[stream.coins(about, lambda i: (abs(int(y[i])) - square / scale) ** 2 / (2 * square))]

    parts, have = [], 0
    while have < count:
        parts.append(accepted(min(count - have, CHUNK)))
        have += len(parts[-1])
    return np.concatenate(parts)[:count] if parts else np.empty(0, np.int64)
