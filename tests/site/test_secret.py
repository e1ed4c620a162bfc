"""The site's secret: who may read it, and what is drawn from it."""

import math
import stat
from pathlib import Path

import pytest
import torch
from scipy import stats as statistics

from weft.core.errors import PolicyError
from weft.site.secret import Secret, secret_of

ONE = Secret(bytes(range(32)))


def test_it_is_made_once_and_its_owner_alone_may_read_it(tmp_path: Path) -> None:
    first = secret_of(tmp_path / "clients")
    path = tmp_path / "clients" / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret_of(tmp_path / "clients") == first
    assert secret_of(tmp_path / "other") != first
    assert [other.name for other in path.parent.iterdir()] == ["secret"]
    assert repr(first) == "Secret()"


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    secret_of(tmp_path)
    (tmp_path / "secret").chmod(0o640)
    with pytest.raises(PolicyError, match="others may read this site's secret; run `chmod 600"):
        secret_of(tmp_path)


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    secret_of(tmp_path)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(PolicyError, match="damaged"):
        secret_of(tmp_path)


def test_its_name_tells_nothing() -> None:
    """Both of an independent computation: 16 hex digits of SHA-256 over a label and the key."""
    assert ONE.name != Secret(bytes(32)).name
    assert len(ONE.name) == 16
    assert ONE.key.hex() not in ONE.name


def test_normal_numbers_are_normal() -> None:
    """100 thousand: Kolmogorov and Smirnov's distance, and the tails to four standard deviations (6.3 expected)."""
    drawn = ONE.normal(100_000, 1, "a", "noise", 0)
    assert statistics.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert 0 < int((drawn.abs() > 4).sum()) < 20
    assert drawn.isfinite().all()


def test_addresses_are_independent() -> None:
    """Neighbouring addresses correlate by less than 5 / sqrt(n); the halves of one draw as well."""
    rows = [ONE.normal(10_000, 1, client, "noise", step) for client in ("a", "b") for step in range(3)]
    rows += [*ONE.normal(20_000, 2, "a", "noise", 0).split(10_000)]
    between = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert float(between.abs().max()) < 5 / math.sqrt(10_000)


def test_an_odd_count_and_none() -> None:
    assert len(ONE.normal(3, "x")) == 3
    assert len(ONE.normal(0, "x")) == 0
    assert len(ONE.uniform(0, "x")) == 0


def test_the_generator_has_more_than_32_bits() -> None:
    """A seed of 32 bits would repeat: keys that differ in one high bit alone draw other numbers."""
    high = Secret(bytes([128, *range(1, 32)]))
    assert not torch.equal(ONE.uniform(4, "x"), high.uniform(4, "x"))


def test_known_answer() -> None:
    """SHAKE-256 of 32 zero bytes and '["weft private draws 1","x"]', little-endian words, upper 53 bits."""
    import hashlib

    word = int.from_bytes(hashlib.shake_256(bytes(32) + b'["weft private draws 1","x"]').digest(8), "little")
    assert float(Secret(bytes(32)).uniform(1, "x")) == (word >> 11) / 2**53
