"""Who a site or a coordinator is: an Ed25519 key, a file that only its owner reads, one line of text for the others.

The text has a prefix that says what it is, so that nobody sends a secret in place of a public key.
"""

import base64
import binascii
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from weft.core.errors import JobError

SECRET, PUBLIC = "weft-secret-key-1-", "weft-key-1-"
_SIZE = 32  # bytes of an Ed25519 key, secret or public


@dataclass(frozen=True, repr=False)
class Identity:
    """A private key; its repr shows the public half alone, so that no log can hold the secret."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> str:
        """Return the public key as text, to be written into a job."""
        return PUBLIC + _text(self.key.public_key().public_bytes_raw())

    def sign(self, content: bytes) -> bytes:
        """Return the signature of bytes, 64 bytes."""
        return self.key.sign(content)

    def __repr__(self) -> str:
        return f"Identity({self.public})"


def new() -> Identity:
    """Draw a new private key from the operating system."""
    return Identity(Ed25519PrivateKey.generate())


def save(identity: Identity, path: Path) -> None:
    """Write a private key to a new file, mode 0600; raise JobError where there is a file already."""
    secret = identity.key.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise JobError(f"{path} exists already; a key is never overwritten, choose another name") from None
    except OSError as error:
        raise JobError(f"{path} cannot be written: {error.strerror}; choose another place") from None
    with os.fdopen(handle, "w") as file:
        file.write(f"{SECRET}{_text(secret)}\n")
        file.flush()
        os.fsync(file.fileno())


def load(path: Path | str) -> Identity:
    """Read a private key; raise JobError for a file that others can read, or that holds something else."""
    path = Path(path)
    if not path.is_file():
        raise JobError(f"there is no key file {path}; make one with `weft keys new NAME`")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise JobError(f"{path}: other users of this machine can read this key; run `chmod 600 {path}`")
    text = path.read_text(encoding="utf8", errors="replace").strip()
    if text.startswith(PUBLIC):
        raise JobError(f"{path} holds a public key; name the file with the private one, NAME.key")
    return Identity(Ed25519PrivateKey.from_private_bytes(_bytes(text, SECRET, str(path))))


def verify(public: str, signature: bytes, content: bytes) -> bool:
    """Tell whether the owner of a public key signed these bytes; raise JobError for a text that is no key."""
    try:
        parse(public).verify(signature, content)
    except InvalidSignature:
        return False
    return True


def parse(public: str) -> Ed25519PublicKey:
    """Return the public key of a text; raise JobError for one that is none."""
    if public.startswith(SECRET):
        raise JobError("this is a private key, which nobody else may see; make a new one and give its public key")
    return Ed25519PublicKey.from_public_bytes(_bytes(public, PUBLIC, "the key"))


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _bytes(text: str, prefix: str, where: str) -> bytes:
    try:
        body = text.removeprefix(prefix)
        content = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not text.startswith(prefix) or len(content) != _SIZE:
        raise JobError(f"{where} is not a key of Weft, which begins with {prefix} and has {_SIZE} bytes after it")
    return content
