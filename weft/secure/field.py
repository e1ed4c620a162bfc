"""Shamir's secret sharing over a prime field: any `threshold` shares give the secret, fewer say nothing about it.

Shamir 1979, "How to Share a Secret". A secret is 32 bytes; the prime is the smallest above 2^256, so every secret is an
element, and a share is 33 bytes. A share's place is a number from 1 on.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, reduce

PRIME = 2**256 + 297
SECRET, SHARE = 32, 33  # bytes


def split(
    secret: bytes, threshold: int, places: Iterable[int], draw: Callable[[int], int] = secrets.randbelow
) -> dict[int, bytes]:
    """Return one share for each place; `draw(n)` gives a number below n, from the operating system.

    >>> coefficients = iter([5, 7])
    >>> shares = split(bytes(31) + b"\\x03", 3, [1, 2], lambda below: next(coefficients))
    >>> [int.from_bytes(shares[place]) for place in (1, 2)]  # 3 + 5 x + 7 x^2
    [15, 41]
    """
    if len(secret) != SECRET or threshold < 1:
        raise ValueError("a secret has 32 bytes and a threshold is positive")
    polynomial = [int.from_bytes(secret), *(draw(PRIME) for _ in range(threshold - 1))]
    return {place: _value(polynomial, place).to_bytes(SHARE) for place in places}


def _value(polynomial: list[int], x: int) -> int:
    """Evaluate by Horner's rule."""
    return reduce(lambda value, coefficient: (value * x + coefficient) % PRIME, reversed(polynomial), 0)


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of `threshold` shares or more; raise ValueError where they are not of one secret.

    >>> combine({1: (15).to_bytes(33), 2: (41).to_bytes(33), 3: (81).to_bytes(33)})[-1]
    3
    """
    weights = _at_zero(tuple(sorted(shares)))
    value = sum(weights[place] * int.from_bytes(share) for place, share in shares.items()) % PRIME
    if value >= 2**256 or any(int.from_bytes(share) >= PRIME for share in shares.values()):
        raise ValueError("the shares do not fit together")
    return value.to_bytes(SECRET)


@lru_cache(maxsize=8)
def _at_zero(places: tuple[int, ...]) -> dict[int, int]:
    """Return Lagrange's weights for the value at zero: prod over others of x_j / (x_j - x_i)."""
    if 0 in places:
        raise ValueError("a place is a number from 1 on")
    weights = {}
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above, below = above * other % PRIME, below * (other - place) % PRIME
        weights[place] = above * pow(below, -1, PRIME) % PRIME
    return weights
