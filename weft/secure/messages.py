"""The messages of secure aggregation: a fixed form, an exact length, a signature; anything else is refused unread.

Every message: "WSA1", its kind (1 byte), the round (4), the sender's place in the cohort (2; a server has none), then:

    MEET        server -> client   nothing: agree on keys for this round
    ADVERT      client -> server   public key for shares (32), public key for masks (32), signature (64)
    ADVERTS     server -> client   the adverts of all who answered, as they came
    SHARES      client -> server   for each other client: its place (2) and two encrypted shares (82); signature
    INBOX       server -> client   for each client that sent shares: its place and the shares for this client
    SURVIVORS   server -> client   the places whose vectors are in the sum
    CONSISTENT  client -> server   signature under the transcript, the adapter received, the senders and survivors
    SIGNATURES  server -> client   the CONSISTENT messages, as they came
    UNMASK      client -> server   for each client that sent shares: which share (1) and the share (33); signature
    REFUSAL     client -> server   one sentence, not signed: it ends the round and does nothing else

A signature is bound to the context that both sides know and that is not sent: job, round, cohort and pinned keys, later
the transcript of keys.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from weft.core.errors import PolicyError
from weft.identity import Identity, verify
from weft.secure.digests import joined
from weft.secure.field import SHARE
from weft.secure.keys import SIZE, TAG, VERSION
from weft.secure.setting import Setting

MAGIC = b"WSA1"
SERVER = 0xFFFF  # in place of a sender's place
SIGNATURE = 64
_HEAD = struct.Struct(">4sBIH")
HEAD = _HEAD.size
ADVERT = HEAD + 2 * SIZE + SIGNATURE
CIPHER = 2 * SHARE + TAG  # two encrypted shares
ENTRY = 2 + CIPHER
SEED, KEY = 1, 2  # which share is released: of the self mask's seed, or of the key for pairwise masks
MOST_WORDS = 500  # bytes of a refusal


class Kind(IntEnum):
    """What a message is."""

    MEET = 1
    ADVERT = 2
    ADVERTS = 3
    SHARES = 4
    INBOX = 5
    SURVIVORS = 6
    CONSISTENT = 7
    SIGNATURES = 8
    UNMASK = 9
    REFUSAL = 10


def plain(kind: Kind, number: int, body: bytes = b"") -> bytes:
    """Return a message of the server."""
    return _HEAD.pack(MAGIC, kind, number, SERVER) + body


@dataclass(frozen=True)
class Signer:
    """A client in a round, who signs what it sends."""

    setting: Setting
    identity: Identity
    place: int

    def signed(self, kind: Kind, body: bytes, *context: bytes) -> bytes:
        """Return a client's message; the context is signed, not sent."""
        told = _HEAD.pack(MAGIC, kind, self.setting.number, self.place) + body
        return told + self.identity.sign(_bound(self.setting, told, context))


def _bound(setting: Setting, told: bytes, context: tuple[bytes, ...]) -> bytes:
    return joined(VERSION, told, setting.context, *context)


def number_of(content: bytes) -> int:
    """Return the round that a message speaks of; raise PolicyError where it has no head."""
    if len(content) < HEAD or content[:4] != MAGIC:
        raise PolicyError("the server sent something else than a message of this protocol")
    return int(_HEAD.unpack_from(content)[2])


def body_of(kind: Kind, number: int, content: bytes, length: int | None = None) -> bytes:
    """Return what stands after a server's head; raise PolicyError for another kind, round or length."""
    if len(content) < HEAD or _HEAD.unpack_from(content) != (MAGIC, kind, number, SERVER):
        raise PolicyError(f"round {number}: the server sent something else than {kind.name} of this round")
    if length is not None and len(content) != HEAD + length:
        raise PolicyError(f"round {number}: {kind.name} has {len(content)} bytes, not {HEAD + length}")
    return content[HEAD:]


def opened(setting: Setting, kind: Kind, content: bytes, length: int, *context: bytes) -> tuple[int, bytes]:
    """Return the sender's place and the body of a client's message of `length` bytes in all.

    Raise PolicyError for another kind, round or length, for a place outside the cohort and for a wrong signature.
    """
    if len(content) != length or length < HEAD + SIGNATURE:
        raise PolicyError(f"round {setting.number}: {kind.name} has {len(content)} bytes, not {length}")
    magic, found, number, place = _HEAD.unpack_from(content)
    if (magic, found, number) != (MAGIC, kind, setting.number) or place >= len(setting.cohort):
        raise PolicyError(f"round {setting.number}: a message is not {kind.name} of this round and cohort")
    name, told = setting.cohort[place], content[:-SIGNATURE]
    if not verify(setting.peers[name], content[-SIGNATURE:], _bound(setting, told, context)):
        raise PolicyError(f"round {setting.number}: {kind.name} is not signed by {name} for what this side knows")
    return place, told[HEAD:]


def cut(content: bytes, size: int) -> list[bytes]:
    """Return pieces of a size; raise PolicyError where some bytes are left."""
    if len(content) % size:
        raise PolicyError(f"a list of {len(content)} bytes does not hold pieces of {size}")
    return [content[start : start + size] for start in range(0, len(content), size)]


def pack_places(places: Sequence[int]) -> bytes:
    """Return places as bytes."""
    return b"".join(place.to_bytes(2) for place in places)


def places_of(content: bytes, setting: Setting) -> tuple[int, ...]:
    """Undo `pack_places`; raise PolicyError where they do not rise or leave the cohort."""
    places = tuple(int.from_bytes(piece) for piece in cut(content, 2))
    if list(places) != sorted(set(places)) or any(place >= len(setting.cohort) for place in places):
        raise PolicyError(f"round {setting.number}: a list of clients names one twice, or one of another round")
    return places


def pack_entries(entries: dict[int, bytes]) -> bytes:
    """Return encrypted shares, each after its place, in order."""
    return b"".join(place.to_bytes(2) + entries[place] for place in sorted(entries))


def entries_of(content: bytes, setting: Setting) -> dict[int, bytes]:
    """Undo `pack_entries`; raise PolicyError for places that do not rise or leave the cohort."""
    pieces = cut(content, ENTRY)
    places = places_of(b"".join(piece[:2] for piece in pieces), setting)
    return {place: piece[2:] for place, piece in zip(places, pieces, strict=True)}


def words_of(content: bytes) -> str | None:
    """Return the sentence of a refusal; None for any other message."""
    if len(content) < HEAD or _HEAD.unpack_from(content)[:2] != (MAGIC, Kind.REFUSAL):
        return None
    return content[HEAD : HEAD + MOST_WORDS].decode(errors="replace")


def refusal(number: int, place: int, words: str) -> bytes:
    """Return a client's refusal."""
    return _HEAD.pack(MAGIC, Kind.REFUSAL, number, place) + words.encode()[:MOST_WORDS]
