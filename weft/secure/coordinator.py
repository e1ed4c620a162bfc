"""The server's half of secure aggregation: it carries messages, and takes off the masks of the sum, never of a client.

It decides nothing that the clients could not refuse: cohort and threshold come from the job, and it holds memory for
one vector. What it is told is checked as the clients check it: a client at fault is named, and the round is not lost.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from weft.core.errors import PolicyError, RunError
from weft.core.types import Link, Order, Question
from weft.secure import field as shamir
from weft.secure import masks, messages
from weft.secure.digests import digest
from weft.secure.field import SHARE
from weft.secure.keys import Pair
from weft.secure.member import pair_mask, public_keys, self_mask, statement, transcript
from weft.secure.messages import Kind
from weft.secure.setting import Setting, colluders, fingerprint

Weigh = Callable[[str, str, str, bytes], int]
"""(question or answer, kind, client, message) -> the bytes that carry it."""


def bare(what: str, kind: str, client: str, message: bytes) -> int:
    """Return the bytes of a message that nothing is put around."""
    return len(message)


@dataclass(frozen=True)
class Coordinator:
    """The server of a job with pinned clients."""

    job: str
    peers: Mapping[str, str]
    """Client -> public identity."""
    weigh: Weigh = bare

    def begin(self, link: Link, order: Order) -> "Agreement":
        """Let the clients of an order agree on keys and exchange shares; raise RunError where too few do."""
        setting = Setting(self.job, order.round, order.cohort, self.peers)
        agreement = Agreement(setting, order, self.weigh)
        agreement.keys(link)
        agreement.shares(link)
        return agreement


@dataclass
class Agreement:
    """One round, from the keys to the opened sum."""

    setting: Setting
    order: Order
    weigh: Weigh = bare
    lost: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)
    """Client -> where it was lost after its vector was counted."""
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    adverts: list[bytes] = field(default_factory=list)
    senders: list[int] = field(default_factory=list)

    @property
    def traffic(self) -> dict[str, tuple[int, int]]:
        """Return client -> bytes up and down of its messages; what stands in the order is the link's to count."""
        return {name: (self.up[name], self.down[name]) for name in sorted({*self.up, *self.down})}

    @cached_property
    def public(self) -> dict[int, tuple[bytes, bytes]]:
        """Return place -> public keys."""
        return public_keys(self.setting, self.adverts)

    @cached_property
    def transcript(self) -> bytes:
        """Return the digest of the round and all adverts."""
        return transcript(self.setting, self.adverts)

    def keys(self, link: Link) -> None:
        """Collect fresh public keys."""
        meet = messages.plain(Kind.MEET, self.setting.number)
        found = self._ask(link, "keys", dict.fromkeys(self.setting.cohort, meet))
        adverts = {}
        for name, content in found.items():
            if self._opened(Kind.ADVERT, name, content, messages.ADVERT) is not None:
                adverts[name] = content
        self.lost |= dict.fromkeys(set(self.setting.cohort) - adverts.keys(), "no keys")
        self._enough(adverts, "agree on keys")
        self.adverts = [adverts[name] for name in sorted(adverts)]

    def shares(self, link: Link) -> None:
        """Pass the encrypted shares on, and with them the order."""
        body = messages.plain(Kind.ADVERTS, self.setting.number, b"".join(self.adverts))
        here = self.setting.names(sorted(self.public))
        length = messages.HEAD + (len(here) - 1) * messages.ENTRY + messages.SIGNATURE
        boxes: dict[int, dict[int, bytes]] = {}
        for name, content in self._ask(link, "shares", dict.fromkeys(here, body)).items():
            told = self._opened(Kind.SHARES, name, content, length, self.transcript)
            if told is not None:
                boxes[self._place(name)] = messages.entries_of(told, self.setting)
        self.lost |= dict.fromkeys(set(here) - set(self.setting.names(sorted(boxes))), "no shares")
        self._enough(boxes, "exchange shares")
        self.senders = sorted(boxes)
        inbox = {}
        for place in self.senders:
            entries = {sender: box[place] for sender, box in boxes.items() if sender != place}
            content = messages.plain(Kind.INBOX, self.setting.number, messages.pack_entries(entries))
            inbox[self.setting.cohort[place]] = content
        clients = tuple(name for name in self.order.clients if name in inbox)
        self.order = replace(self.order, clients=clients, secure=inbox)

    def finish(self, link: Link, survivors: Sequence[str], vector: Tensor) -> dict[str, Any]:
        """Take the masks off the sum of the survivors' vectors, in place; return what the journal keeps.

        Raise RunError where fewer than the threshold stay to the end.
        """
        places = tuple(sorted(map(self._place, survivors)))
        self._enough(places, "send their update")
        agreed = digest(self.transcript, fingerprint(self.order.state))
        signed = self._consistent(link, places, statement(agreed, self.senders, places))
        shares = self._released(link, places, signed)
        self._open(vector, agreed, places, shares)
        faithless = min(colluders(len(self.setting.cohort)), len(places) - 2)
        return {
            "threshold": self.setting.threshold,
            "survivors": len(places),
            "colluders": faithless,
            "hidden_among": len(places) - faithless,
            "late": dict(sorted(self.late.items())),
            "bytes_up": sum(self.up.values()),
            "bytes_down": sum(self.down.values()),
        }

    def _consistent(self, link: Link, places: tuple[int, ...], said: tuple[bytes, ...]) -> dict[str, bytes]:
        """Let the survivors sign who they are."""
        names = self.setting.names(places)
        body = messages.plain(Kind.SURVIVORS, self.setting.number, messages.pack_places(places))
        length = messages.HEAD + messages.SIGNATURE
        signed = {}
        for name, content in self._ask(link, "consistency", dict.fromkeys(names, body)).items():
            if self._opened(Kind.CONSISTENT, name, content, length, *said) is not None:
                signed[name] = content
        self.late |= dict.fromkeys(set(names) - signed.keys(), "did not sign who is in the sum, or got another adapter")
        self._enough(signed, "sign who is in the sum")
        return signed

    def _released(
        self, link: Link, places: tuple[int, ...], signed: Mapping[str, bytes]
    ) -> dict[int, dict[int, bytes]]:
        """Return place -> the shares of one of its secrets, by who held them (from 1)."""
        body = messages.plain(Kind.SIGNATURES, self.setting.number, b"".join(signed[name] for name in sorted(signed)))
        length = messages.HEAD + len(self.senders) * (1 + SHARE) + messages.SIGNATURE
        kinds = [messages.SEED if place in places else messages.KEY for place in self.senders]
        shares: dict[int, dict[int, bytes]] = {place: {} for place in self.senders}
        released = set()
        for name, content in self._ask(link, "unmask", dict.fromkeys(sorted(signed), body)).items():
            told = self._opened(Kind.UNMASK, name, content, length, self.transcript)
            pieces = messages.cut(told, 1 + SHARE) if told is not None else []
            if [piece[0] for piece in pieces] == kinds:
                released.add(name)
                for place, piece in zip(self.senders, pieces, strict=True):
                    shares[place][self._place(name) + 1] = piece[1:]
        self.late |= dict.fromkeys(signed.keys() - released, "released no shares")
        self._enough(released, "release shares")
        return shares

    def _open(
        self, vector: Tensor, agreed: bytes, places: tuple[int, ...], shares: Mapping[int, Mapping[int, bytes]]
    ) -> None:
        """Subtract each survivor's own mask, and the masks that survivors share with those who dropped out."""
        public = self.public
        for place in self.senders:
            secret = self._secret(place, shares[place])
            if place in places:
                masks.add(vector, self_mask(secret, agreed), -1)
                continue
            if Pair(secret).public != public[place][1]:
                raise RunError(self._unfit(place))
            for other in places:
                key = pair_mask(secret, public[other][1], agreed, (place, other))
                masks.add(vector, key, -1 if other < place else 1)

    def _secret(self, place: int, shares: Mapping[int, bytes]) -> bytes:
        """Combine shares, as many as the threshold."""
        chosen = {holder: shares[holder] for holder in sorted(shares)[: self.setting.threshold]}
        try:
            return shamir.combine(chosen)
        except ValueError:
            raise RunError(self._unfit(place)) from None

    def _unfit(self, place: int) -> str:
        name = self.setting.cohort[place]
        return f"round {self.setting.number}: the shares of {name}'s secret do not fit together: a client sent others"

    def _ask(self, link: Link, kind: str, to: Mapping[str, bytes]) -> dict[str, bytes]:
        """Ask clients; raise PolicyError with the sentence of one that refuses."""
        self.down.update({name: self.weigh("question", kind, name, content) for name, content in to.items()})
        found: dict[str, bytes] = {}
        for answers in link.ask(Question(f"secure.{kind}", {"to": dict(to)})):
            told = answers.items() if isinstance(answers, Mapping) else ()
            found |= {name: content for name, content in told if name in to and isinstance(content, bytes)}
        self.up.update({name: self.weigh("answer", kind, name, content) for name, content in found.items()})
        for name in sorted(found):
            if words := messages.words_of(found[name]):
                raise PolicyError(f"client {name} stopped: {words}")
        return found

    def _opened(self, kind: Kind, name: str, content: bytes, length: int, *context: bytes) -> bytes | None:
        """Return the body of a client's answer; None for one that is not its own, which counts as no answer."""
        try:
            place, body = messages.opened(self.setting, kind, content, length, *context)
        except PolicyError:
            return None
        return body if place == self._place(name) else None

    def _place(self, name: str) -> int:
        return self.setting.cohort.index(name)

    def _enough(self, found: Iterable[Any], deed: str) -> None:
        """Raise RunError where fewer clients than the threshold do something."""
        count, least = len(list(found)), self.setting.threshold
        if count < least:
            raise RunError(
                f"round {self.setting.number}: {count} of {len(self.setting.cohort)} clients {deed}, and secure "
                f"aggregation needs {least}; what they sent stays hidden"
            )
