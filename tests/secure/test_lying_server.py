"""A server that lies: one test for each lie, in which the clients stop it; where they do not look, it succeeds."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.secure.crowd import (
    IDENTITIES,
    LENGTH,
    NAMES,
    STATE,
    Crowd,
    begin,
    crowd,
    hidden,
    masked_sum,
    plain_sum,
    vector,
)
from weft import identity
from weft.core.errors import PolicyError, RunError
from weft.core.types import Question
from weft.secure import field, keys, masks, messages
from weft.secure.coordinator import Agreement
from weft.secure.digests import digest
from weft.secure.member import answer, pair_mask, public_keys, self_mask, transcript
from weft.secure.messages import Kind, Signer
from weft.secure.setting import Setting, fingerprint


def setting(people: Crowd, number: int = 1) -> Setting:
    peers = {name: member.identity.public for name, member in people.members.items()}
    return Setting("job", number, tuple(sorted(peers)), peers)


def ask(people: Crowd, kind: str, name: str, content: bytes) -> bytes:
    """Send one client one message past the honest coordinator."""
    return answer(people.members, Question(f"secure.{kind}", {"to": {name: content}}))[name]


def words(content: bytes) -> str:
    said = messages.words_of(content)
    assert said is not None, "the client did not refuse"
    return said


# --- keys that are not the clients' own


def signed_by(who: identity.Identity, people: Crowd, place: int) -> tuple[bytes, keys.Pair]:
    pair = keys.new()
    advert = Signer(setting(people), who, place).signed(Kind.ADVERT, keys.new().public + pair.public)
    return advert, pair


def swapping(people: Crowd, advert: bytes, place: int) -> None:
    """Let the server put an advert of its own in the place of a client's, in the lists of all others."""

    def tamper(kind: str, client: str, content: bytes) -> bytes:
        if kind != "shares" or NAMES.index(client) == place:
            return content
        start = messages.HEAD + place * messages.ADVERT
        return content[:start] + advert + content[start + messages.ADVERT :]

    people.tamper = tamper


def test_swapped_keys_end_the_round_at_every_site() -> None:
    people = crowd(4)
    advert, _ = signed_by(identity.new(), people, 1)
    swapping(people, advert, 1)
    with pytest.raises(PolicyError, match="client a stopped: round 1: ADVERT is not signed by b for what this side"):
        begin(people)
    assert all(people.members[name]._session is None for name in "acd")


def test_swapped_keys_that_nobody_verifies_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the signature the clients share their secrets with the server's own key."""
    people = crowd(4)
    advert, _ = signed_by(identity.new(), people, 1)
    swapping(people, advert, 1)
    monkeypatch.setattr(messages, "verify", lambda public, signature, content: True)
    met = begin(people)
    assert met.order.clients == tuple("abcd")


def test_a_key_of_an_earlier_round_or_of_another_job_is_refused() -> None:
    people = crowd(4)
    old = begin(people, 1).adverts[1]
    swapping(people, old, 1)
    with pytest.raises(PolicyError, match="a message is not ADVERT of this round and cohort"):
        begin(people, 2)
    people = crowd(4)
    other = replace(setting(people), job="another")
    advert = Signer(other, IDENTITIES["b"], 1).signed(Kind.ADVERT, keys.new().public + keys.new().public)
    swapping(people, advert, 1)
    with pytest.raises(PolicyError, match="ADVERT is not signed by b for what this side knows"):
        begin(people)


def test_one_key_for_two_clients_and_two_keys_of_one_are_refused() -> None:
    people = crowd(4)
    honest = begin(people).adverts
    twice = Signer(setting(people), IDENTITIES["b"], 1).signed(Kind.ADVERT, honest[0][messages.HEAD :][:64])
    with pytest.raises(PolicyError, match="one key is in the list twice"):
        public_keys(setting(people), [honest[0], twice, *honest[2:]])
    with pytest.raises(PolicyError, match="two keys of a"):
        public_keys(setting(people), [honest[0], *honest])
    assert len(public_keys(setting(people), honest)) == 4


def test_a_client_that_is_left_out_of_the_list_of_keys_stops() -> None:
    people = crowd(4)
    people.tamper = lambda kind, client, content: content[: -messages.ADVERT] if kind == "shares" else content
    with pytest.raises(PolicyError, match="client d stopped: round 1: the list of keys leaves this client out"):
        begin(people)


def test_replayed_keys_of_a_broken_off_round_never_open_a_sum() -> None:
    """The server shows all but b an older key of b, of the same round; no threshold signs one transcript."""
    people = crowd(4)
    old = begin(people).adverts[1]
    swapping(people, old, 1)
    with pytest.raises(RunError, match="1 of 4 clients exchange shares"):
        begin(people)


# --- who survived


def opening(size: int = 6) -> tuple[Crowd, Agreement]:
    """Return clients that have sent their vectors."""
    people = crowd(size)
    met = begin(people)
    masked_sum(people, met, NAMES[:size])
    return people, met


def survivors(people: Crowd, names: str) -> bytes:
    return messages.plain(Kind.SURVIVORS, 1, messages.pack_places([NAMES.index(name) for name in names]))


def test_two_lists_of_survivors_open_nothing() -> None:
    """Half of the sites hear that f is lost, half that it is there: neither share of anyone comes out."""
    people, _ = opening()
    told = {name: "abcde" if name in "abc" else "abcdef" for name in "abcdef"}
    signed = {name: ask(people, "consistency", name, survivors(people, told[name])) for name in "abcdef"}
    everyone = messages.plain(Kind.SIGNATURES, 1, b"".join(signed[name] for name in "abcdef"))
    half = messages.plain(Kind.SIGNATURES, 1, b"".join(signed[name] for name in "abc"))
    assert "CONSISTENT is not signed by d" in words(ask(people, "unmask", "a", everyone))
    assert "fewer than 5 clients have signed the survivors" in words(ask(people, "unmask", "b", half))


def test_a_list_of_survivors_that_nobody_compares_gives_both_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: where clients ask for no signatures of others, the server gets both kinds of shares of f.

    t = 5 of 6 are needed of each kind, so the server of this test still cannot combine both: each client gives one.
    """
    people, _ = opening()
    monkeypatch.setattr(Setting, "threshold", property(lambda self: 0))
    kinds = []
    for name, told in (("a", "abcde"), ("b", "abcdef")):
        ask(people, "consistency", name, survivors(people, told))
        released = ask(people, "unmask", name, messages.plain(Kind.SIGNATURES, 1))
        pieces = messages.cut(released[messages.HEAD : -messages.SIGNATURE], 1 + field.SHARE)
        kinds.append(pieces[NAMES.index("f")][0])
    assert kinds == [messages.KEY, messages.SEED]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("abcd", "a sum of 4 clients is not opened; the least is 5"),
        ("bcdef", "this client's vector is not in the sum"),
        ("abcdeff", "a list of clients names one twice"),
        ("abcdeg", "names one twice, or one of another round"),
    ],
)
def test_a_list_of_survivors_that_cannot_be_is_refused(told: str, reason: str) -> None:
    people, _ = opening()
    assert reason in words(ask(people, "consistency", "a", survivors(people, told)))


def test_a_sum_is_not_opened_for_a_client_that_sent_no_shares() -> None:
    people = crowd(6).fork(shares={"f"})
    met = begin(people)
    masked_sum(people, met, "abcde")
    assert "is not opened" in words(ask(people, "consistency", "a", survivors(people, "abcdef")))


# --- both shares


def signatures(people: Crowd, names: str) -> bytes:
    signed = [ask(people, "consistency", name, survivors(people, names)) for name in names]
    return messages.plain(Kind.SIGNATURES, 1, b"".join(signed))


def test_the_second_kind_of_share_is_never_given() -> None:
    """After a release the server says that f is lost: the same question gets the same answer, another one none."""
    people, _ = opening()
    before = signatures(people, "abcdef")
    released = ask(people, "unmask", "a", before)
    assert ask(people, "unmask", "a", before) == released
    assert "`secure.consistency` was asked twice, and not the same" in words(
        ask(people, "consistency", "a", survivors(people, "abcde"))
    )
    people, _ = opening()
    ask(people, "unmask", "a", signatures(people, "abcdef"))
    assert "`secure.unmask` was asked twice" in words(ask(people, "unmask", "a", messages.plain(Kind.SIGNATURES, 1)))
    with pytest.raises(RunError, match="a has no keys for this round any more"):
        ask(people, "unmask", "a", before)


def test_each_client_gives_one_share_of_each_other() -> None:
    people, _ = opening()
    told = ask(people, "unmask", "b", signatures(people, "abcde"))
    pieces = messages.cut(told[messages.HEAD : -messages.SIGNATURE], 1 + field.SHARE)
    assert [piece[0] for piece in pieces] == [messages.SEED] * 5 + [messages.KEY]


def test_both_secrets_open_a_vector() -> None:
    """Negative control: with both secrets of a client the server reads its vector, which is what one share protects."""
    people = crowd(3)
    met = begin(people)
    masked = hidden(people, met, "a")
    session = people.members["a"]._session
    assert session is not None
    agreed = digest(transcript(setting(people), met.adverts), fingerprint(STATE))
    masks.add(masked, self_mask(session.seed, agreed), -1)
    for other in (1, 2):
        masks.add(masked, pair_mask(session.masking.secret, session.public[other][1], agreed, (0, other)), -1)
    assert torch.equal(masked, vector("a"))


# --- replays


def test_an_order_that_is_replayed_after_the_opening_gets_nothing() -> None:
    """The secrets are forgotten: a vector that is masked again would be masked by nothing."""
    people, met = opening(4)
    hidden(people, met, "a")
    signed = signatures(people, "abcd")
    with pytest.raises(RunError, match="no keys for this round any more"):
        hidden(people, met, "a")
    ask(people, "unmask", "a", signed)
    with pytest.raises(RunError, match="no keys for this round any more"):
        hidden(people, met, "a")


def test_questions_of_another_round_or_out_of_order_are_refused() -> None:
    people = crowd(4)
    begin(people, 2)
    assert "something else than SURVIVORS of this round" in words(
        ask(people, "consistency", "a", survivors(people, "abcd"))
    )
    people = crowd(4)
    begin(people)
    assert "this client's vector is not in the sum" in words(ask(people, "consistency", "a", survivors(people, "abcd")))
    people = crowd(4)
    begin(people)
    assert "fewer than 3 clients have signed" in words(ask(people, "unmask", "a", messages.plain(Kind.SIGNATURES, 1)))
    with pytest.raises(RunError, match="a has no keys for this round any more"):
        ask(crowd(4), "shares", "a", messages.plain(Kind.ADVERTS, 1))
    assert "has no place here" in words(ask(crowd(4), "everything", "a", b""))


def test_signatures_of_another_round_open_nothing() -> None:
    people, _ = opening(4)
    old = signatures(people, "abcd")
    met = begin(people, 1)  # the round is begun anew, with fresh keys
    masked_sum(people, met, "abcd")
    for name in "abcd":
        ask(people, "consistency", name, survivors(people, "abcd"))
    assert "CONSISTENT is not signed by" in words(ask(people, "unmask", "a", old))


# --- threshold, cohort, adapter


def test_a_server_with_a_lower_threshold_gets_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would open a sum of two of six; the clients count for themselves."""
    people = crowd(6)
    met = begin(people)
    masked_sum(people, met, "ab")
    monkeypatch.setattr(Agreement, "_enough", lambda self, found, deed: None)
    with pytest.raises(PolicyError, match="client a stopped: round 1: a sum of 2 clients is not opened; the least is"):
        met.finish(people, "ab", torch.zeros(LENGTH, dtype=torch.int32))


def test_a_lower_threshold_of_all_sides_would_open_the_sum_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the threshold is what protects; with one of two everywhere the sum of two is opened."""
    monkeypatch.setattr(Setting, "threshold", property(lambda self: 2))
    people = crowd(6)
    met = begin(people)
    total = masked_sum(people, met, "ab")
    met.finish(people, "ab", total)
    assert torch.equal(total, plain_sum("ab"))


def test_the_cohort_is_the_jobs_and_not_the_servers() -> None:
    """Each client draws the cohort itself; a round that it was not drawn for, and two clients, are refused."""
    people = crowd(5)
    for member in people.members.values():
        member.cohort = lambda number: ("a", "b", "c", "d")
    assert "e was not drawn" in words(ask(people, "keys", "e", messages.plain(Kind.MEET, 1)))
    people.silent = {"keys": "e"}
    with pytest.raises(RunError, match="0 of 5 clients agree on keys"):  # those of a..d are for their own cohort
        begin(people)
    people = crowd(3)
    for member in people.members.values():
        member.cohort = lambda number: ("a", "b")
    assert "2 clients are too few; the least is 3" in words(ask(people, "keys", "a", messages.plain(Kind.MEET, 1)))


def test_sites_that_got_different_adapters_sum_to_noise_and_say_so() -> None:
    people = crowd(4)
    met = begin(people)
    total = masked_sum(people, met, "abc")
    other = fingerprint({"adapter": {"w": torch.tensor([0.5, -1.0000001])}})
    total += people.members["d"].hide(1, met.order.secure["d"], other, vector("d"))
    late = met.finish(people, "abcd", total)["late"]
    assert late == {"d": "did not sign who is in the sum, or got another adapter"}
    assert int(total.abs().max()) > 2**20


def test_changed_shares_are_noticed() -> None:
    people = crowd(4)
    met = begin(people)
    inbox = bytearray(met.order.secure["a"])
    inbox[messages.HEAD + 40] ^= 1
    with pytest.raises(PolicyError, match="round 1: the shares of b were changed on the way"):
        people.members["a"].hide(1, bytes(inbox), fingerprint(STATE), vector("a"))
    assert people.members["a"]._session is None


def test_messages_of_a_wrong_size_are_refused_unread() -> None:
    people = crowd(3)
    for content in (b"", b"WSA1", b"x" * 11, messages.plain(Kind.MEET, 1, b"more"), messages.plain(Kind.INBOX, 1)):
        words(ask(people, "keys", "a", content))
    begin(people)
    assert "does not hold pieces" in words(ask(people, "consistency", "a", messages.plain(Kind.SURVIVORS, 1, b"odd")))


@pytest.mark.parametrize("kind", ["keys", "shares", "consistency", "unmask"])
def test_an_answer_in_anothers_name_counts_for_nobody(kind: str) -> None:
    """A client gives another's answer, or one bit is flipped: it is lost, and of three clients none may be."""
    for change in (lambda found: {**found, "b": found["a"]}, lambda found: {**found, "b": flipped(found["b"])}):
        people = Spoiled(crowd(3).members, kind=kind, change=change)
        with pytest.raises(RunError, match="2 of 3 clients"):
            whole_round(people)


def whole_round(people: Crowd) -> None:
    met = begin(people)
    met.finish(people, "abc", masked_sum(people, met, "abc"))


def flipped(content: bytes) -> bytes:
    return content[:-70] + bytes([content[-70] ^ 1]) + content[-69:]


class Spoiled(Crowd):
    """A link that changes the answers to one kind of question."""

    def __init__(self, members: object, kind: str, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
        super().__init__(members)  # type: ignore[arg-type]
        self.kind, self.change = kind, change

    def ask(self, question: Question) -> list[dict[str, bytes]]:
        (found,) = super().ask(question)
        return [self.change(found) if question.kind == f"secure.{self.kind}" else found]


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["keys", "shares", "consistency", "unmask", "other"]), st.binary(max_size=600), st.integers(0, 10)
)
def test_any_bytes_are_refused_in_words(kind: str, content: bytes, head: int) -> None:
    """Random bytes, some after a right head, to a client in the middle of a round: a refusal, and no other error."""
    people = FUZZED.fork()
    content = messages.plain(Kind(head), 1, content) if head in (1, 3, 5, 6, 8) else content
    if kind != "keys" or head != 1 or len(content) > messages.HEAD:
        words(ask(people, kind, "a", content))


FUZZED = crowd(3)
begin(FUZZED)
