"""What may pass from the network to Flower's Fleet API: known keys, signed requests of a bounded size, eight calls.

Everything else of Flower is not there: neither its Control nor its Runtime API is part of this process's application.
Flower's own node authentication signs the time alone; here the signature covers the path, the time, a number used
once and the body, with the key that the job names, so that a request can be neither altered nor played again.
"""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from weft import identity
from weft.core.errors import JobError

CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
MOST_BODY = 6 << 20  # bytes of a request; Flower cuts what is larger into objects of 5 MiB
CLOCKS = 300.0  # seconds that the clocks of two machines may differ
HOLD = 20.0  # seconds that a request for messages waits for one, so that sites need not ask often
BUSY = 503  # the status of a request that must come again
BODY_WAIT = 120.0  # seconds within which a body must have come

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def signed(path: str, moment: str, once: str, body: bytes) -> bytes:
    """Return the bytes that a request's signature covers."""
    return "\0".join(("weft-fleet-1", path, moment, once, hashlib.sha256(body).hexdigest())).encode()


class Refused(Exception):
    """A request that does not pass, with the status and the sentence for both sides."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass
class Gate:
    """An ASGI application before another one: checks who asks, and what, and how much."""

    app: Any
    names: dict[str, str]
    """Public key -> name of the site."""
    allowed: Callable[[str, str, Any], None]
    """(site, call, request) -> nothing; raises Refused for a node or a reply that is not this site's."""
    before: Callable[[str, str, Any], Awaitable[None]]
    """(site, call, request): waits until there is a message for a site, or room for its reply; HOLD seconds at most.
    Raises Refused where there is still no room."""
    after: Callable[[str, str], None]
    """(site, call): called when a request has been answered."""
    say: Callable[[str], None]
    _seen: dict[str, float] = field(default_factory=dict)
    _said: dict[str, float] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] != "http":
            return
        where = (scope.get("client") or ("?",))[0]
        try:
            call = scope["path"].removeprefix("/v1/fleet/")
            if scope["method"] != "POST" or call not in CALLS or not scope["path"].startswith("/v1/fleet/"):
                raise Refused(404, f"{where} asked for {_shown(scope['path'])}, which is not there")
            body = await asyncio.wait_for(_body(scope, receive), BODY_WAIT)
            site = self._site(scope, body)
            request = _parsed(scope["path"], body)
            self.allowed(site, call, request)
            await self.before(site, call, request)
            del request
        except Refused as refused:
            if refused.status != BUSY:
                self._note(refused.sentence)
            await _answer(send, refused)
            return
        except TimeoutError:
            self._note(f"{where} took more than {BODY_WAIT:.0f} s for one request; it was let go")
            return
        try:
            await self.app(scope, _replayed(body, receive), send)
        except Exception as error:  # whatever it is, the log must name it: the server itself is kept silent
            self._note(f"{call} of {site} failed here: {type(error).__name__}: {error}")
            raise
        self.after(site, call)

    def _site(self, scope: Scope, body: bytes) -> str:
        """Return the name of the site that signed a request; raise Refused where none of the job's did."""
        where = (scope.get("client") or ("?",))[0]
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
        public, moment, once = (headers.get(f"x-weft-{part}", "") for part in ("key", "time", "once"))
        site = self.names.get(public)
        if site is None:
            raise Refused(401, f"a node at {where} has a key that the job does not name ({_shown(public) or 'no key'})")
        if not _verified(public, headers.get("x-weft-signature", ""), signed(scope["path"], moment, once, body)):
            raise Refused(401, f"a request from {where} in the name of {site} has a wrong signature")
        self._check_fresh(site, moment, f"{public}{once}")
        return site

    def _check_fresh(self, site: str, moment: str, once: str) -> None:
        now = time.time()
        ahead = (float(moment) if moment.replace(".", "", 1).isdecimal() else 0.0) - now
        if abs(ahead) > CLOCKS:
            way = "ahead of" if ahead > 0 else "behind"
            raise Refused(
                401,
                f"the clock of {site} is {abs(ahead):.0f} s {way} the coordinator's, or a request is that old; "
                "set both clocks (NTP)",
            )
        if once in self._seen:
            raise Refused(409, f"a request of {site} came twice; the second was ignored")
        for old in [key for key, until in self._seen.items() if until < now][:1000]:
            del self._seen[old]
        self._seen[once] = now + 2 * CLOCKS

    def _note(self, sentence: str) -> None:
        """Say a sentence at most once in ten seconds: whoever knocks must not fill the disk."""
        now = time.monotonic()
        if now - self._said.get(sentence, -60.0) > 10:
            if len(self._said) > 1000:
                self._said.clear()
            self._said[sentence] = now
            self.say(f"refused: {sentence}")


def _verified(public: str, signature: str, content: bytes) -> bool:
    try:
        return identity.verify(public, base64.b64decode(signature, validate=True), content)
    except (ValueError, JobError):
        return False


def _parsed(path: str, body: bytes) -> Any:
    from google.protobuf.message import DecodeError

    message = PROTOBUF_REQUEST_TYPES["POST", path]()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise Refused(400, "a request is damaged") from None
    return message


async def _body(scope: Scope, receive: Receive) -> bytes:
    """Read a body whose size is known and bounded before the first byte of it."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    if not length.isdigit() or int(length) > MOST_BODY:
        raise Refused(413, f"a request has {length.decode('latin1') or 'no stated'} bytes; {MOST_BODY} are the most")
    parts = []
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise Refused(400, "a connection was cut within a request")
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the application the body that was read, then the rest of the connection's life."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, refused: Refused) -> None:
    content = json.dumps({"detail": refused.sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _shown(text: str) -> str:
    return "".join(letter for letter in text[:60] if letter.isprintable())
