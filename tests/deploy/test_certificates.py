"""The coordinator's certificates: made once, private, for the names that sites use."""

import ssl
import stat
from pathlib import Path

import pytest

from weft.core.errors import JobError
from weft.deploy.certificates import certificates


def test_they_are_made_once_and_again_for_a_new_name(tmp_path: Path) -> None:
    first = certificates(tmp_path, ["127.0.0.1", "here.example"])
    ca, cert = first.ca.read_bytes(), first.cert.read_bytes()
    assert certificates(tmp_path, ["here.example"]) == first
    assert (first.ca.read_bytes(), first.cert.read_bytes()) == (ca, cert)
    certificates(tmp_path, ["there.example"])
    assert first.ca.read_bytes() == ca
    assert first.cert.read_bytes() != cert
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_client_that_trusts_the_ca_accepts_these_names_and_no_others(tmp_path: Path) -> None:
    files = certificates(tmp_path, ["127.0.0.1", "here.example"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.cert, files.key)
    for name, trusted in (("127.0.0.1", True), ("here.example", True), ("there.example", False)):
        assert _accepts(ssl.create_default_context(cafile=str(files.ca)), server, name) is trusted
    other = certificates(tmp_path / "other", ["here.example"])
    assert not _accepts(ssl.create_default_context(cafile=str(other.ca)), server, "here.example")


def _accepts(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> bool:
    """Shake hands in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


def test_damaged_ones_are_named(tmp_path: Path) -> None:
    files = certificates(tmp_path, ["here.example"])
    files.cert.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(JobError, match="its certificates are damaged"):
        certificates(tmp_path, ["here.example"])
