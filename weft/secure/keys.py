"""Keys of one round: X25519 pairs, and what two clients derive from them, each use with its own words.

One suite and no negotiation. Every derived key is bound to a purpose, this version and the whole transcript, so that
clients that saw different rounds, cohorts, keys or adapters derive different keys.
"""

import os
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from weft.secure.digests import joined

VERSION = b"weft secure aggregation 1"
SIZE = 32  # bytes of a secret, of a public key and of a derived key
TAG = 16  # bytes that encryption adds


@dataclass(frozen=True, repr=False)
class Pair:
    """A secret of this round and the public key that belongs to it; its repr shows neither."""

    secret: bytes

    @property
    def public(self) -> bytes:
        """Return the public key, 32 bytes."""
        return X25519PrivateKey.from_private_bytes(self.secret).public_key().public_bytes_raw()


def new() -> Pair:
    """Draw a pair from the operating system."""
    return Pair(os.urandom(SIZE))


def agree(secret: bytes, public: bytes, purpose: str, *context: bytes) -> bytes:
    """Return the key that two clients share for a purpose, 32 bytes; raise ValueError for a public key that is none."""
    shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    return derive(shared, purpose, *context)


def derive(secret: bytes, purpose: str, *context: bytes) -> bytes:
    """Return HKDF-SHA-256 of a secret, 32 bytes, bound to a purpose and a context."""
    info = joined(VERSION, purpose.encode(), *context)
    return HKDF(hashes.SHA256(), SIZE, salt=None, info=info).derive(secret)


_ONCE = bytes(12)  # the nonce: every key encrypts one message


def encrypt(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Encrypt the one message of a key by AES-256-GCM, bound to what it is about."""
    return AESGCM(key).encrypt(_ONCE, plain, about)


def decrypt(key: bytes, cipher: bytes, about: bytes) -> bytes:
    """Undo `encrypt`; raise cryptography's InvalidTag for anything else."""
    return AESGCM(key).decrypt(_ONCE, cipher, about)
