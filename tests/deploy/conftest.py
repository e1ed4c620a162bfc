"""Certificates for a coordinator on loopback, once a file of tests."""

import pytest

from weft.deploy.certificates import Certificates, certificates


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certs"), ["127.0.0.1"])
