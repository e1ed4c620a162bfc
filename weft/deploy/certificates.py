"""The coordinator's TLS certificate: signed by a CA of its own, which sites are given as one file, ca.pem."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from weft.core.errors import JobError

CA_DAYS, SERVER_DAYS = 3650, 397
_EARLY = datetime.timedelta(hours=1)  # clocks differ


@dataclass(frozen=True)
class Certificates:
    """Three files: what sites trust, what the coordinator shows, and its private key."""

    ca: Path
    cert: Path
    key: Path


def certificates(folder: Path, names: Sequence[str]) -> Certificates:
    """Return the certificates of a folder, made where they are missing or do not have all names.

    The CA stays the same once it is made, so that sites need no new file when the coordinator gets another name.
    """
    files = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not files.ca.is_file():
            _make_ca(files.ca, folder / "ca.key")
        if not _covers(files, names):
            _make_server(files, folder / "ca.key", names)
    except OSError as error:
        raise JobError(f"{error.filename or folder}: {error.strerror}; name another folder with --certs") from None
    except ValueError as error:
        raise JobError(f"{folder}: its certificates are damaged ({error}); name another folder with --certs") from None
    return files


def _covers(files: Certificates, names: Sequence[str]) -> bool:
    if not files.cert.is_file() or not files.key.is_file():
        return False
    cert = x509.load_pem_x509_certificate(files.cert.read_bytes())
    held = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = cert.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return set(_names(names)) <= set(held) and left > datetime.timedelta(days=30)


def _names(names: Sequence[str]) -> list[x509.GeneralName]:
    return [_name(name) for name in dict.fromkeys(names)]


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _make_ca(path: Path, key_path: Path) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), _subject("Weft coordinator CA")
    builder = _builder(name, name, key, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    _write(key_path, _private(key), 0o600)
    _write(path, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), 0o644)


def _make_server(files: Certificates, ca_key_path: Path, names: Sequence[str]) -> None:
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    ca_key = serialization.load_pem_private_key(ca_key_path.read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_subject(names[0][:60]), ca.subject, key, SERVER_DAYS)
    builder = builder.add_extension(x509.SubjectAlternativeName(_names(names)), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    _write(files.key, _private(key), 0o600)
    _write(files.cert, builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that is never readable by more than `mode` says."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    os.replace(temporary, path)
