"""What has broken other implementations: reused keys, late vectors, small cohorts, differences of sums, crashes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from tests.secure.crowd import STATE, Crowd, begin, crowd, hidden, masked_sum, plain_sum, vector
from weft.core.errors import PolicyError, RunError
from weft.core.types import Question
from weft.secure import masks, messages
from weft.secure.digests import digest
from weft.secure.keys import Pair
from weft.secure.ledger import Ledger
from weft.secure.member import answer, pair_mask
from weft.secure.setting import Setting, colluders, fingerprint

LONG = 200_000


def chi_square(numbers: Tensor) -> float:
    """Return the chance that uniform 32-bit numbers have bytes as unevenly spread as these, over all four bytes."""
    found = np.frombuffer(numbers.numpy().tobytes(), np.uint8).reshape(-1, 4)
    counts = np.stack([np.bincount(found[:, byte], minlength=256) for byte in range(4)])
    expected = len(found) / 256
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), 4 * 255))


def small(length: int = LONG) -> Tensor:
    """Return what an update looks like in the ring: numbers around zero."""
    draw = torch.Generator().manual_seed(5)
    return (torch.randn(length, generator=draw) * 3e5).to(torch.int32)


# --- one masked vector


def test_a_masked_vector_is_uniform() -> None:
    """Bytes of 200,000 numbers: chi-square with 1020 degrees of freedom; below 1e-6 once in a million runs."""
    people = crowd(3)
    masked = hidden(people, begin(people), "a", small())
    assert chi_square(masked) > 1e-6
    assert chi_square(torch.diff(masked)) > 1e-6


@pytest.mark.parametrize(
    "weak",
    [
        lambda plain: plain,
        lambda plain: plain + 123456789,
        lambda plain: plain + torch.randint(-(2**24), 2**24, plain.shape, dtype=torch.int32),
        lambda plain: plain + torch.randint(-(2**31), 2**31 - 2**27, plain.shape, dtype=torch.int64).to(torch.int32),
    ],
)
def test_weak_masks_are_not_uniform(weak: Callable[[Tensor], Tensor]) -> None:
    """Negative control: no mask, one number for all, 25 bits, a range that leaves out a sixteenth."""
    assert chi_square(weak(small())) < 1e-6


def test_a_late_vector_stays_hidden_after_its_key_is_revealed() -> None:
    """D is said to be lost, its key is put together, then its vector arrives: the self mask is still on it."""
    people = crowd(4)
    met = begin(people)
    total = masked_sum(people, met, "abc")
    late = hidden(people, met, "d", small())
    session = people.members["d"]._session
    assert session is not None
    secret, agreed = session.masking.secret, session.agreed
    met.finish(people, "abc", total)
    assert torch.equal(total, plain_sum("abc"))
    for place in range(3):  # what the server now knows of d
        masks.add(late, pair_mask(secret, met.public[place][1], agreed, (3, place)), 1)
    assert chi_square(late) > 1e-6


def test_without_a_self_mask_a_late_vector_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the same server, and no second mask."""
    monkeypatch.setattr("weft.secure.member.self_mask", lambda seed, agreed: bytes(32))
    people = crowd(4)
    met = begin(people)
    late = hidden(people, met, "d", small())
    session = people.members["d"]._session
    assert session is not None
    masks.add(late, bytes(32), -1)
    for place in range(3):
        masks.add(late, pair_mask(session.masking.secret, met.public[place][1], session.agreed, (3, place)), 1)
    assert torch.equal(late, small())


# --- keys


def test_keys_are_new_in_every_round_and_attempt() -> None:
    people = crowd(3)
    seen = []
    for number in (1, 2, 2, 3):
        seen += [key for pair in begin(people, number).public.values() for key in pair]
    assert len(set(seen)) == len(seen) == 4 * 3 * 2


def test_the_same_vector_is_masked_otherwise_in_the_next_round() -> None:
    people = crowd(3)
    first, second = (hidden(people, begin(people, number), "a", vector("a")) for number in (1, 2))
    assert not torch.equal(first, second)


def test_no_key_can_be_read_from_a_repr() -> None:
    people = crowd(3)
    begin(people)
    member = people.members["a"]
    session = member._session
    assert session is not None
    for secret in (session.seed, session.masking.secret, session.cipher.secret):
        for text in (repr(member), repr(session), repr(session.masking), repr(member.identity)):
            assert secret.hex() not in text
            assert repr(secret) not in text


def test_secrets_are_forgotten_once_shares_are_released() -> None:
    people = crowd(3)
    met = begin(people)
    met.finish(people, "abc", masked_sum(people, met, "abc"))
    session = people.members["a"]._session
    assert session is not None
    assert (session.seed, session.cipher, session.masking, session.shares) == (b"", Pair(b""), Pair(b""), {})


# --- cohorts


@pytest.mark.parametrize(("names", "reason"), [("ab", "2 clients are too few"), ("a", "1 clients are too few")])
def test_a_small_cohort_is_refused(names: str, reason: str) -> None:
    peers = {name: member.identity.public for name, member in crowd(3).members.items()}
    with pytest.raises(PolicyError, match=reason):
        Setting("job", 1, tuple(names), peers)


def test_a_cohort_with_a_name_or_a_key_twice_is_refused() -> None:
    peers = {name: member.identity.public for name, member in crowd(4).members.items()}
    for names, known in (("abb", peers), ("acb", peers), ("abc", {**peers, "c": peers["b"]}), ("abz", peers)):
        with pytest.raises(PolicyError, match="names a client twice, or one without a key of its own"):
            Setting("job", 1, tuple(names), known)


def test_a_third_of_the_cohort_may_collude() -> None:
    """2 t > n + c: a server with c helpers cannot collect t shares of both kinds from n - c honest clients."""
    for n in range(3, 200):
        t, c = 2 * n // 3 + 1, colluders(n)
        assert t <= n
        assert 2 * t > n + c
        assert c >= (n - 1) // 3 - 1


# --- differences of sums


def test_a_round_is_opened_for_one_set_of_survivors(tmp_path: Path) -> None:
    """The server dies after the opening and comes back: the same survivors may be opened again, others never."""
    people = crowd(4)
    for name, member in people.members.items():
        member.ledger = Ledger(tmp_path / f"{name}.jsonl")
    met = begin(people)
    met.finish(people, "abcd", masked_sum(people, met, "abcd"))
    again = begin(people)
    total = masked_sum(people, again, "abcd")
    again.finish(people, "abcd", total)
    assert torch.equal(total, plain_sum("abcd"))
    met = begin(people)
    with pytest.raises(PolicyError, match="client a stopped: round 1: this sum was opened for a, b, c, d; with other"):
        met.finish(people, "abc", masked_sum(people, met, "abc"))


def test_an_adapter_is_opened_for_one_set_of_survivors_under_any_number() -> None:
    people = crowd(4)
    met = begin(people)
    met.finish(people, "abcd", masked_sum(people, met, "abcd"))
    met = begin(people, 2)
    with pytest.raises(PolicyError, match="round 2: this sum was opened for a, b, c, d"):
        met.finish(people, "abd", masked_sum(people, met, "abd"))


def test_a_ledger_survives_a_restart_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "opened.jsonl"
    Ledger(path).open(3, b"one", ("a", "b", "c"))
    with open(path, "ab") as file:
        file.write(b'{"round": 4, "adap')
    after = Ledger(path)
    after.open(4, b"two", ("a", "b", "d"))
    assert path.stat().st_mode & 0o077 == 0
    for number, adapter in ((3, b"new"), (9, b"one"), (4, b"new"), (9, b"two")):
        with pytest.raises(PolicyError, match="the difference would show a single update"):
            Ledger(path).open(number, adapter, ("x", "y", "z"))
    Ledger(path).open(3, b"one", ("a", "b", "c"))
    Ledger(path).open(5, b"three", ("x", "y", "z"))
    assert len(Ledger(path).rows) == 3


def test_the_ledger_is_written_before_a_share_leaves() -> None:
    class Full(Ledger):
        def open(self, number: int, adapter: bytes, survivors: tuple[str, ...]) -> None:
            raise PolicyError("the disk is full")

    people = crowd(3)
    met = begin(people)
    total = masked_sum(people, met, "abc")
    people.members["b"].ledger = Full()
    with pytest.raises(PolicyError, match="client b stopped: the disk is full"):
        met.finish(people, "abc", total)


# --- crashes


@pytest.mark.parametrize("kind", ["shares", "vector", "consistency", "unmask"])
def test_a_client_that_is_killed_and_restarted_has_dropped_out(kind: str) -> None:
    """Its keys were in memory alone: after the restart it answers nothing of this round, masks nothing, and the
    others go on: without its vector where it had sent none.
    """
    people = crowd(4)
    restarted: list[str] = []

    def tamper(asked: str, client: str, content: bytes) -> bytes:
        if (asked, client) == (kind, "b"):
            restarted.append(kind)
            people.members["b"] = replace(people.members["b"], _session=None)
        return content

    people.tamper = tamper
    met = begin(people)
    if kind == "vector":
        tamper(kind, "b", b"")
        with pytest.raises(RunError, match="b has no keys for this round any more, and drops out"):
            people.members["b"].check(1)
        with pytest.raises(RunError, match="b has no keys for this round any more, and drops out"):
            hidden(people, met, "b")
    names = "acd" if kind in ("shares", "vector") else "abcd"
    total = masked_sum(people, met, names)
    met.finish(people, names, total)
    assert torch.equal(total, plain_sum(names))
    assert restarted == [kind]
    assert met.lost == ({"b": "no shares"} if kind == "shares" else {})
    assert list(met.late) == (["b"] if kind in ("consistency", "unmask") else [])


def test_a_client_that_has_keys_is_ready() -> None:
    people = crowd(3)
    begin(people)
    people.members["a"].check(1)
    with pytest.raises(RunError, match="a has no keys for this round"):
        people.members["a"].check(2)


def whole_round(people: Crowd) -> None:
    met = begin(people)
    met.finish(people, "abcd", masked_sum(people, met, "abcd"))


def test_a_server_that_restarts_begins_with_new_keys_and_the_old_vectors_stay_hidden() -> None:
    people = crowd(3)
    met = begin(people)
    old = masked_sum(people, met, "abc")
    after = begin(people)
    total = masked_sum(people, after, "abc")
    with pytest.raises(RunError, match="0 of 3 clients sign who is in the sum"):
        met.finish(people, "abc", old)
    after = begin(people)
    total = masked_sum(people, after, "abc")
    after.finish(people, "abc", total)
    assert torch.equal(total, plain_sum("abc"))
    assert not torch.equal(old, plain_sum("abc"))


# --- what leaves a client


def everything(
    name: str, plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[tuple[str, str, bytes]], Tensor]:
    """Return all messages of a client in a round, and its vector, with the same random numbers for every update."""
    count = iter(range(10**6))
    monkeypatch.setattr("weft.secure.keys.os.urandom", lambda size: digest(b"test", str(next(count)).encode()))
    monkeypatch.setattr("weft.secure.member.urandom", lambda size: digest(b"test", str(next(count)).encode()))
    monkeypatch.setattr("weft.secure.field.split.__defaults__", (lambda below: 7 + next(count),))
    people = crowd(4)
    met = begin(people)
    sent = hidden(people, met, name, plain)
    total = masked_sum(people, met, sorted(set("abcd") - {name})) + sent[:5]
    met.finish(people, "abcd", total)
    return [row for row in people.said if row[1] == name], sent


def test_no_message_but_the_vector_depends_on_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates, two weights, the same random numbers: every message is the same, byte for byte, but the vector."""
    one, first = everything("b", torch.tensor([1, 2, 3, 40, 5], dtype=torch.int32), monkeypatch)
    other, second = everything("b", torch.tensor([-9, 0, 7, 41, 6], dtype=torch.int32), monkeypatch)
    assert one == other
    assert (first - second).tolist() == [10, 2, -4, -1, -1]


def test_every_message_of_a_round_has_its_exact_size_and_decodes() -> None:
    """Four clients: 4 adverts of 139 bytes; 3 entries of 84 in a message of shares; 4 shares of 34 at the end."""
    people = crowd(4)
    met = begin(people)
    met.finish(people, "abcd", masked_sum(people, met, "abcd"))
    sizes = {
        kind: {len(content) for said, _, content in people.said if said == kind}
        for kind in dict.fromkeys(k for k, _, _ in people.said)
    }
    head, sign = 11, 64
    assert (head, sign) == (messages.HEAD, messages.SIGNATURE)
    assert sizes == {
        "keys": {head + 64 + sign},
        "shares": {head + 3 * 84 + sign},
        "consistency": {head + sign},
        "unmask": {head + 4 * 34 + sign},
    }
    assert sum(met.up.values()) == sum(len(content) for _, _, content in people.said)
    kinds = {messages.Kind(content[4]).name for _, _, content in people.said}
    assert kinds == {"ADVERT", "SHARES", "CONSISTENT", "UNMASK"}


def test_the_fingerprint_sees_every_bit() -> None:
    """Names, shapes, types, and the sign of a zero."""
    states = [
        STATE,
        {"adapter": {"w": torch.tensor([0.5, -1.0]), "v": torch.zeros(1)}},
        {"adapter": {"v": torch.tensor([0.5, -1.0])}},
        {"other": {"w": torch.tensor([0.5, -1.0])}},
        {"adapter": {"w": torch.tensor([[0.5, -1.0]])}},
        {"adapter": {"w": torch.tensor([0.0])}},
        {"adapter": {"w": torch.tensor([-0.0])}},
        {"adapter": {"w": torch.tensor(0.0)}},
        {"adapter": {"w": torch.empty(0)}},
    ]
    assert len({fingerprint(state) for state in states}) == len(states)
    assert fingerprint(STATE) == fingerprint({"adapter": {"w": torch.tensor([0.5, -1.0])}})


def test_the_record_of_a_round() -> None:
    """Of 7, t = 5, so 2 of 7 may be lost; 2 t - n - 1 = 2 may collude; a sum of 6 hides an update among 4."""
    people = crowd(7).fork(shares={"c"})
    met = begin(people)
    names = "abdefg"
    said = met.finish(people, names, masked_sum(people, met, names))
    assert {key: said[key] for key in ("threshold", "survivors", "colluders", "hidden_among", "late")} == {
        "threshold": 5,
        "survivors": 6,
        "colluders": 2,
        "hidden_among": 4,
        "late": {},
    }
    assert (said["bytes_up"], said["bytes_down"]) == (sum(met.up.values()), sum(met.down.values()))


# --- answers that are none


@pytest.mark.parametrize("false", [{"b": 3}, {"b": None}, ["b"], "b", 7, {"stranger": b"WSA1"}])
def test_an_answer_that_is_no_message_counts_as_none(false: object) -> None:
    """A site may send anything: what is not bytes of a client that was asked is as if nothing had come."""
    people = crowd(4)
    ask = people.ask

    def answered(question: Question) -> list[object]:
        (found,) = ask(question)
        if question.kind == "secure.shares":
            found.pop("b")
            return [false, found]
        return [found]

    people.ask = answered  # type: ignore[method-assign]
    met = begin(people)
    assert met.lost == {"b": "no shares"}


@pytest.mark.parametrize("body", [{}, {"to": []}, {"to": {"a": "text"}}])
def test_a_question_that_is_damaged_is_refused_in_words(body: dict[str, object]) -> None:
    with pytest.raises(RunError, match=r"a question `secure\.keys` is damaged"):
        answer(crowd(3).members, Question("secure.keys", body))
