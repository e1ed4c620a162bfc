"""Every way in which up to six clients can drop out: the opened sum is the plain sum, bit for bit, or is refused.

A client stays, or is gone before it sends keys, shares, its vector, its signature or its released shares: 6^n patterns.
They are walked as a tree: from a state of all clients, each subset that goes on is tried once, on copies. A refusal
covers every pattern that goes on from it, for nothing comes after it; the test counts what it covers up to 6^n.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.secure.crowd import Crowd, begin, coordinator, crowd, hidden, masked_sum, order, plain_sum
from weft.core.errors import RunError
from weft.core.meeting import threshold
from weft.secure.coordinator import Agreement


@pytest.fixture(autouse=True)
def _remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agree on each key, and verify each signature, once: copies of a state ask for the same ones again."""
    from weft.secure import keys, messages

    monkeypatch.setattr(keys, "agree", lru_cache(None)(keys.agree))
    monkeypatch.setattr(messages, "verify", lru_cache(None)(messages.verify))


def subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for size in range(len(names) + 1):
        yield from combinations(names, size)


class Walk:
    """Counts the patterns that were opened and those that were refused."""

    def __init__(self, size: int) -> None:
        self.people, self.least = crowd(size), threshold(size)
        self.names = tuple(sorted(self.people.members))
        self.opened = self.refused = 0

    def goes_on(self, here: tuple[str, ...], later: int, act: Callable[[], object]) -> bool:
        """Tell whether enough go on; where too few do, see `act` refuse.

        `later` phases follow, in each of which, or in none, each of `here` could have been lost.
        """
        if len(here) >= self.least:
            return True
        with pytest.raises(RunError, match=f"{len(here)} of {len(self.names)} clients .* needs {self.least}"):
            act()
        self.refused += (later + 1) ** len(here)
        return False

    def keys(self) -> None:
        for here in subsets(self.names):
            gone = set(self.names) - set(here)
            if self.goes_on(here, 4, partial(begin, self.people.fork(keys=gone))):
                self.shares(here)

    def shares(self, keyed: tuple[str, ...]) -> None:
        for here in subsets(keyed):
            people = self.people.fork(keys=set(self.names) - set(keyed), shares=set(keyed) - set(here))
            if self.goes_on(here, 3, partial(begin, people)):
                met = begin(people)
                reasons = {name: "no shares" if name in keyed else "no keys" for name in self.names if name not in here}
                assert met.lost == reasons
                self.vectors(here, people, met)

    def vectors(self, shared: tuple[str, ...], before: Crowd, met: Agreement) -> None:
        for here in subsets(shared):
            people = before.fork()
            total = masked_sum(people, met, here)
            if self.goes_on(here, 2, partial(met.finish, people, here, total)):
                assert not torch.equal(total, plain_sum(here))
                self.signatures(here, people, met, total)

    def signatures(self, counted: tuple[str, ...], before: Crowd, met: Agreement, total: Tensor) -> None:
        for here in subsets(counted):
            gone = set(counted) - set(here)
            people = before.fork(consistency=gone)
            if self.goes_on(here, 1, partial(replace(met, late={}).finish, people, counted, total.clone())):
                self.releases(counted, here, partial(before.fork, consistency=gone), (met, total))

    def releases(
        self, counted: tuple[str, ...], signing: tuple[str, ...], fork: Any, masked: tuple[Agreement, Tensor]
    ) -> None:
        for here in subsets(signing):
            met, result = replace(masked[0], late={}), masked[1].clone()
            finish = partial(met.finish, fork(unmask=set(signing) - set(here)), counted, result)
            if self.goes_on(here, 0, finish):
                assert set(finish()["late"]) == set(counted) - set(here)
                assert torch.equal(result, plain_sum(counted)), (counted, signing, here)
                self.opened += 1


@pytest.mark.parametrize(("size", "opened"), [(3, 1), (4, 21), (5, 26), (6, 31)])
def test_every_pattern(size: int, opened: int) -> None:
    """With a threshold of n (n = 3) only one pattern opens; with n - 1 (n = 4, 5, 6) all stay, or one of n is lost in
    one of five phases: 1 + 5 n. All 6^n patterns are covered.
    """
    walk = Walk(size)
    walk.keys()
    assert walk.opened == opened
    assert walk.opened + walk.refused == 6**size


def test_more_than_one_may_be_lost() -> None:
    """Of seven clients two may go: one without shares, one without a vector; of ten three, in three phases."""
    people = crowd(10).fork(shares={"b"}, unmask={"d"})
    met = begin(people)
    counted = tuple(name for name in "adefghij")
    total = masked_sum(people, met, counted)
    assert met.finish(people, counted, total)["late"] == {"d": "released no shares"}
    assert torch.equal(total, plain_sum(counted))


def test_a_sum_with_one_mask_too_many_is_not_taken_for_right() -> None:
    """Negative control: the vector of a client that is said to be lost is in the sum all the same."""
    people = crowd(4)
    met = coordinator(people).begin(people, order(people))
    total = masked_sum(people, met, "abcd")
    met.finish(people, "abc", total)
    assert not torch.equal(total, plain_sum("abc"))
    assert not torch.equal(total, plain_sum("abcd"))


def test_a_masked_vector_is_made_once_and_again_the_same() -> None:
    people = crowd(3)
    met = begin(people)
    assert torch.equal(hidden(people, met, "a"), hidden(people, met, "a"))
    with pytest.raises(RunError, match="a second vector under the same masks"):
        hidden(people, met, "a", torch.ones(5, dtype=torch.int32))
