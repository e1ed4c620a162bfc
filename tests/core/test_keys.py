"""Addresses of random draws: the same everywhere, each its own, and nothing global is touched."""

import hashlib

import torch

from weft.core import keys


def test_a_number_is_the_hash_of_its_address() -> None:
    """The first 8 bytes of SHA-256 of the address as compact JSON, without the lowest bit."""
    digest = hashlib.sha256(b'["weft",7,1,"clinic","batches"]').digest()
    assert keys.number(7, 1, "clinic", "batches") == int.from_bytes(digest[:8], "big") // 2
    assert 0 <= keys.number(7, 1, "clinic", "batches") < 2**63


def test_addresses_do_not_run_into_each_other() -> None:
    """The negative control is joining the words: 1 and 23 would be 12 and 3."""
    addresses = [(1, 23), (12, 3), ("1", 23), ("1,23",), ("1", "23"), (1, 23, ""), ()]
    assert len({keys.number(7, *address) for address in addresses}) == len(addresses)
    assert keys.number(7, 1) != keys.number(8, 1)


def test_a_generator_is_fresh_and_the_global_one_untouched() -> None:
    before = torch.get_rng_state()
    one, same, other = (torch.rand(4, generator=keys.generator(7, word)) for word in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_permutation_holds_each_place_once() -> None:
    assert sorted(keys.permutation(100, 7, "x")) == list(range(100))
    assert keys.permutation(100, 7, "x") == keys.permutation(100, 7, "x") != keys.permutation(100, 7, "y")
    assert keys.permutation(0, 7) == []


def test_permutations_are_uniform_enough() -> None:
    """Each of 4 places comes first in about 1000 of 4000 draws; 5 standard deviations are 137."""
    first = [keys.permutation(4, 7, number)[0] for number in range(4000)]
    assert all(abs(first.count(place) - 1000) < 137 for place in range(4))
