"""A client's half of secure aggregation: a state machine for one round after another, pure of any network.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", with their consistency
round. The client takes job, cohort, threshold and the others' identities from its own copy of the job; the server only
carries messages. Whatever does not fit ends the round here: the secrets are forgotten and one sentence goes out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import urandom

from cryptography.exceptions import InvalidTag
from torch import Tensor

from weft.core.errors import PolicyError, RunError
from weft.core.types import Order, Question
from weft.identity import Identity
from weft.secure import field as shamir
from weft.secure import keys, masks, messages
from weft.secure.digests import digest
from weft.secure.field import SHARE
from weft.secure.keys import SIZE, Pair
from weft.secure.ledger import Ledger
from weft.secure.messages import Kind, Signer
from weft.secure.setting import Setting

Shares = tuple[bytes, bytes]
"""Of one client's secrets, for one client: the share of its seed and the share of its key."""


@dataclass(repr=False)
class _Session:
    """What a client holds of one round, in memory alone: after a crash it has dropped out."""

    signer: Signer
    cipher: Pair
    masking: Pair
    advert: bytes
    seed: bytes = b""
    """Of the self mask."""
    public: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Place -> public keys for shares and for masks."""
    transcript: bytes = b""
    shares: dict[int, Shares] = field(default_factory=dict)
    """Place -> the shares that this client holds of its secrets, the own one included."""
    agreed: bytes = b""
    adapter: bytes = b""
    vector: bytes = b""
    """The digest of the vector that was masked."""
    survivors: tuple[int, ...] = ()
    answered: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """Kind of question -> question and answer: the same question gets the same answer, another one a refusal."""


@dataclass
class Member:
    """One client in all rounds."""

    name: str
    identity: Identity
    job: str
    peers: Mapping[str, str]
    """Client -> public identity, for all clients of the job."""
    cohort: Callable[[int], tuple[str, ...]]
    """Number of a round -> who is drawn for it, in name order."""
    ledger: Ledger = field(default_factory=Ledger)
    _session: _Session | None = field(default=None, repr=False)

    def answer(self, kind: str, content: bytes) -> bytes:
        """Answer one message of the server; a refusal is an answer too. Raise RunError where it has dropped out."""
        try:
            if kind == "keys":
                return self._keys(content)
            return self._once(kind, content)
        except PolicyError as error:
            self._session = None
            return messages.refusal(0, 0, str(error))

    def _keys(self, content: bytes) -> bytes:
        """Begin a round with fresh keys, whatever went before."""
        self._session = None
        number = messages.number_of(content)
        messages.body_of(Kind.MEET, number, content, 0)
        setting = Setting(self.job, number, self.cohort(number), self.peers)
        if self.name not in setting.cohort:
            raise PolicyError(f"round {number}: {self.name} was not drawn for this round")
        if setting.peers[self.name] != self.identity.public:
            raise PolicyError(f"the job pins another key for {self.name} than the one it has")
        signer = Signer(setting, self.identity, setting.cohort.index(self.name))
        cipher, masking = keys.new(), keys.new()
        advert = signer.signed(Kind.ADVERT, cipher.public + masking.public)
        self._session = _Session(signer, cipher, masking, advert)
        return advert

    @property
    def _without_keys(self) -> str:
        return f"{self.name} has no keys for this round any more, and drops out"

    def check(self, number: int) -> None:
        """Raise RunError where this client has no keys for a round, so that nobody trains in vain."""
        session = self._session
        if session is None or session.signer.setting.number != number or not session.transcript or session.survivors:
            raise RunError(self._without_keys)

    def _once(self, kind: str, content: bytes) -> bytes:
        """Answer a question of the round that is going on, each kind once and in order."""
        steps = {"shares": self._shares, "consistency": self._consistency, "unmask": self._unmask}
        if kind not in steps:
            raise PolicyError(f"a question `secure.{kind}` has no place here")
        session = self._session
        if session is None:
            raise RunError(self._without_keys)
        if kind in session.answered:
            asked, answer = session.answered[kind]
            if asked != content:
                number = session.signer.setting.number
                raise PolicyError(f"round {number}: `secure.{kind}` was asked twice, and not the same")
            return answer
        answer = steps[kind](session, content)
        session.answered[kind] = content, answer
        return answer

    def _shares(self, session: _Session, content: bytes) -> bytes:
        """Check everyone's keys against the pinned identities, then share the two secrets among them."""
        setting, own = session.signer.setting, session.signer.place
        adverts = messages.cut(messages.body_of(Kind.ADVERTS, setting.number, content), messages.ADVERT)
        session.public = public_keys(setting, adverts)
        if session.advert not in adverts or len(adverts) < setting.threshold:
            raise PolicyError(
                f"round {setting.number}: the list of keys leaves this client out, or has fewer than "
                f"{setting.threshold} clients"
            )
        session.transcript = transcript(setting, adverts)
        session.seed = urandom(SIZE)
        places = [place + 1 for place in session.public]
        seeds = shamir.split(session.seed, setting.threshold, places)
        parts = shamir.split(session.masking.secret, setting.threshold, places)
        session.shares[own] = seeds[own + 1], parts[own + 1]
        sealed = {}
        for place, (public, _) in session.public.items():
            if place != own:
                key, about = _channel(session, public, own, place)
                sealed[place] = keys.encrypt(key, seeds[place + 1] + parts[place + 1], about)
        return session.signer.signed(Kind.SHARES, messages.pack_entries(sealed), session.transcript)

    def hide(self, number: int, inbox: bytes, adapter: bytes, vector: Tensor) -> Tensor:
        """Return the vector with all masks of this client; `adapter` is the fingerprint of what it received.

        Raise PolicyError for shares that are not whom they claim to be from, RunError for a second, different vector.
        """
        self.check(number)
        session = self._session
        assert session is not None
        if not session.agreed:
            try:
                self._receive(session, inbox)
            except PolicyError:
                self._session = None
                raise
            session.adapter, session.agreed = adapter, digest(session.transcript, adapter)
        seen = digest(vector.numpy().data, adapter, inbox)
        if session.vector not in (b"", seen):
            raise RunError("a second vector under the same masks would show the difference; this client drops out")
        session.vector = seen
        hidden = vector.clone()
        for sign, key in _pairwise(session):
            masks.add(hidden, key, sign)
        masks.add(hidden, self_mask(session.seed, session.agreed), 1)
        return hidden

    def _receive(self, session: _Session, inbox: bytes) -> None:
        """Decrypt the shares of the others; those who sent some are the senders of this round."""
        setting, own = session.signer.setting, session.signer.place
        entries = messages.entries_of(messages.body_of(Kind.INBOX, setting.number, inbox), setting)
        if own in entries or not entries.keys() <= session.public.keys() or len(entries) + 1 < setting.threshold:
            raise PolicyError(f"round {setting.number}: the shares are not those of enough clients with keys")
        for place, sealed in entries.items():
            key, about = _channel(session, session.public[place][0], place, own)
            try:
                shares = keys.decrypt(key, sealed, about)
            except InvalidTag:
                name = setting.cohort[place]
                raise PolicyError(f"round {setting.number}: the shares of {name} were changed on the way") from None
            session.shares[place] = shares[:SHARE], shares[SHARE:]

    def _consistency(self, session: _Session, content: bytes) -> bytes:
        """Sign whose vectors are in the sum, as the server says; all must be told the same."""
        setting = session.signer.setting
        told = messages.body_of(Kind.SURVIVORS, setting.number, content)
        survivors = messages.places_of(told, setting)
        if not session.vector or session.signer.place not in survivors:
            raise PolicyError(f"round {setting.number}: this client's vector is not in the sum")
        if not session.shares.keys() >= set(survivors) or len(survivors) < setting.threshold:
            raise PolicyError(
                f"round {setting.number}: a sum of {len(survivors)} clients is not opened; the least is "
                f"{setting.threshold} of those who sent shares"
            )
        session.survivors = survivors
        return session.signer.signed(Kind.CONSISTENT, b"", *self._statement(session))

    def _statement(self, session: _Session) -> tuple[bytes, bytes, bytes]:
        return statement(session.agreed, sorted(session.shares), session.survivors)

    def _unmask(self, session: _Session, content: bytes) -> bytes:
        """Release one share of each client, once the threshold has signed the same survivors; forget the secrets."""
        setting = session.signer.setting
        told = messages.body_of(Kind.SIGNATURES, setting.number, content)
        length = messages.HEAD + messages.SIGNATURE
        signed = [
            messages.opened(setting, Kind.CONSISTENT, piece, length, *self._statement(session))[0]
            for piece in messages.cut(told, length)
        ]
        if not session.survivors or len(set(signed) & set(session.survivors)) < setting.threshold:
            raise PolicyError(
                f"round {setting.number}: fewer than {setting.threshold} clients have signed the survivors, so nothing "
                "is released"
            )
        self.ledger.open(setting.number, session.adapter, setting.names(session.survivors))
        body = b""
        for place in sorted(session.shares):
            seed, key = session.shares[place]
            body += bytes([messages.SEED]) + seed if place in session.survivors else bytes([messages.KEY]) + key
        context = session.transcript
        session.shares, session.seed = {}, b""
        session.cipher = session.masking = Pair(b"")
        return session.signer.signed(Kind.UNMASK, body, context)


def public_keys(setting: Setting, adverts: list[bytes]) -> dict[int, tuple[bytes, bytes]]:
    """Return place -> public keys from signed adverts; raise PolicyError for one twice, or for one key of two."""
    public: dict[int, tuple[bytes, bytes]] = {}
    for advert in adverts:
        place, body = messages.opened(setting, Kind.ADVERT, advert, messages.ADVERT)
        if place in public:
            raise PolicyError(f"round {setting.number}: two keys of {setting.cohort[place]}")
        public[place] = body[:SIZE], body[SIZE:]
    if len({key for pair in public.values() for key in pair}) < 2 * len(public):
        raise PolicyError(f"round {setting.number}: one key is in the list twice")
    return public


def transcript(setting: Setting, adverts: list[bytes]) -> bytes:
    """Return what all later keys and signatures are bound to: the round and every advert in it."""
    return digest(b"transcript", setting.context, *sorted(adverts))


def statement(agreed: bytes, senders: list[int], survivors: tuple[int, ...]) -> tuple[bytes, bytes, bytes]:
    """Return what a survivor signs: keys and adapter, who sent shares, whose vectors are in the sum."""
    return agreed, messages.pack_places(senders), messages.pack_places(survivors)


def pair_mask(secret: bytes, public: bytes, agreed: bytes, places: tuple[int, int]) -> bytes:
    """Return the key of the mask that two clients share; the one in the lower place adds it."""
    return keys.agree(secret, public, "pairwise mask", agreed, messages.pack_places(sorted(places)))


def self_mask(seed: bytes, agreed: bytes) -> bytes:
    """Return the key of a client's own mask."""
    return keys.derive(seed, "self mask", agreed)


def _pairwise(session: _Session) -> Iterator[tuple[int, bytes]]:
    """Yield sign and key of the mask shared with each other client that sent shares."""
    own = session.signer.place
    for place in sorted(session.shares.keys() - {own}):
        secret, public = session.masking.secret, session.public[place][1]
        yield (1 if own < place else -1), pair_mask(secret, public, session.agreed, (own, place))


def _channel(session: _Session, public: bytes, sender: int, receiver: int) -> tuple[bytes, bytes]:
    """Return the key and the associated data for the shares from one client to another."""
    about = messages.pack_places([sender, receiver])
    number = session.signer.setting.number
    try:
        return keys.agree(session.cipher.secret, public, "shares", session.transcript, about), about
    except ValueError:
        raise PolicyError(f"round {number}: a public key in the list is none") from None


def without_keys(members: Mapping[str, Member], order: Order) -> dict[str, str]:
    """Say which clients of an order have no keys for its round, so that nothing of them could leave."""
    found = {}
    for name in [name for name in order.clients if name in members]:
        try:
            members[name].check(order.round)
        except RunError as error:
            found[name] = str(error)
    return found


def answer(members: Mapping[str, Member], question: Question) -> dict[str, bytes]:
    """Answer `secure.KIND` for each client that lives here: body {"to": {client: message}}.

    A client that has dropped out gives no answer; raise RunError with its sentence where there is no other.
    """
    kind, to = question.kind.removeprefix("secure."), question.body.get("to")
    if not isinstance(to, Mapping) or not all(isinstance(content, bytes) for content in to.values()):
        raise RunError(f"a question `{question.kind}` is damaged: it is no message to each client")
    found, gone = {}, []
    for name in [name for name in to if name in members]:
        try:
            found[name] = members[name].answer(kind, to[name])
        except RunError as error:
            gone.append(str(error))
    if gone and not found:
        raise RunError("; ".join(gone))
    return found
