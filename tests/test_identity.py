"""Keys: what is written, what is refused, what a signature covers."""

import stat
from pathlib import Path

import pytest

from weft import identity
from weft.core.errors import JobError


def test_a_key_comes_back_and_signs(tmp_path: Path) -> None:
    made = identity.new()
    identity.save(made, tmp_path / "a.key")
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    again = identity.load(tmp_path / "a.key")
    assert again.public == made.public
    signature = again.sign(b"content")
    assert identity.verify(made.public, signature, b"content")
    assert not identity.verify(made.public, signature, b"Content")
    assert not identity.verify(identity.new().public, signature, b"content")
    assert not identity.verify(made.public, signature[:-1] + bytes([signature[-1] ^ 1]), b"content")


def test_two_keys_are_never_alike_and_the_secret_is_in_no_text() -> None:
    first, second = identity.new(), identity.new()
    assert first.public != second.public
    secret = first.key.private_bytes_raw().hex()
    assert secret not in repr(first).encode().hex()
    assert first.public in repr(first)


def test_a_known_vector() -> None:
    """RFC 8032, section 7.1, test 2: secret 4ccd..., message 0x72, signature 92a0...c00."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    known = identity.Identity(Ed25519PrivateKey.from_private_bytes(secret))
    assert known.sign(b"\x72").hex().startswith("92a009a9f0d4cab8720e820b5f642540")
    assert known.public == "weft-key-1-PUAXw-hDiVqStwqnTRt-vJyYLM8uxJaMwM1V8Sr0Zgw"


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    identity.save(identity.new(), tmp_path / "a.key")
    before = (tmp_path / "a.key").read_bytes()
    with pytest.raises(JobError, match="never overwritten"):
        identity.save(identity.new(), tmp_path / "a.key")
    assert (tmp_path / "a.key").read_bytes() == before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    identity.save(identity.new(), tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(JobError, match="chmod 600"):
        identity.load(tmp_path / "a.key")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a key"),
        ("weft-secret-key-1-AAAA", "is not a key"),
        ("weft-secret-key-1-" + "?" * 43, "is not a key"),
        ("weft-key-1-" + "A" * 43, "holds a public key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "is not a key"),
    ],
)
def test_another_file_is_no_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(JobError, match=says):
        identity.load(path)


def test_a_secret_in_place_of_a_public_key_is_named() -> None:
    with pytest.raises(JobError, match="private key, which nobody else may see"):
        identity.parse("weft-secret-key-1-" + "A" * 43)
