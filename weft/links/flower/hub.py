"""The coordinator's end: Flower's Fleet API, its link state and its object store in this process, behind the gate.

A ticket is a message to one site until its reply is whole. A site asks for messages only when it has nothing to do;
so one that asks while a delivered ticket of its own is open has lost it (killed, or the connection was cut), and gets
it again. Nothing is written to a disk: what must survive a crash is in the run folder, and sites come back.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from flwr.app import ArrayRecord
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    _get_computed_object_ids,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from weft.links.flower.gate import BUSY, HOLD, Gate, Refused
from weft.links.flower.listener import listen
from weft.links.flower.records import CHUNK, chunks, joined, most_objects, record

TTL = 30 * 86400.0  # seconds; an order's deadline is the link's own, and Flower's only out of the way
BEAT = 10.0  # seconds between signs of life of the run itself, within Flower's 60
ROOM = 512 << 20  # bytes
FEW = 16  # objects of a reply that is small, which never waits


@dataclass
class Ticket:
    """One message to one site, and where it stands."""

    site: str
    front: bytes
    body: ArrayRecord
    message: str = ""
    """Flower's id of the message; empty until the site asks for it."""
    sent: int = 0
    coming: int = 0
    """Bytes of its reply, at most, from when the site announces it until it is collected."""


@dataclass
class Hub:
    """Sends messages to sites by name and collects their replies."""

    keys: Mapping[str, str]
    """Name of each site of the job -> its public key."""
    say: Callable[[str], None]
    most_bytes: int = 16 << 30
    """No reply is larger."""
    room: int = ROOM
    """Bytes of replies that are taken at a time, if they are more than one; others wait at their sites."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    """Notified whenever a site has done something."""
    _nodes: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, float] = field(default_factory=dict)
    _tickets: dict[int, Ticket] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)
    _lock: Any = field(default_factory=threading.RLock)
    _calls: dict[str, asyncio.Event] = field(default_factory=dict)
    _loop: asyncio.AbstractEventLoop | None = None
    """That of the open port, known once a site has asked for a message."""
    _over: threading.Event = field(default_factory=threading.Event)

    def start(self, address: tuple[str, int], cert: Path, key: Path) -> int:
        """Open the port and return its number; raise JobError where it cannot be opened."""
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        _, self._factory = get_objectstore_linkstate_factories(FLWR_IN_MEMORY_DB_NAME, get_federation_manager())
        self._state = self._factory.state()
        for name, public in self.keys.items():
            self._nodes[name] = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public.encode(), 0)
            self._calls[name] = asyncio.Event()
        self._begin_run()
        names = {public: name for name, public in self.keys.items()}
        gate = Gate(_fleet(self._factory), names, self._allowed, self._before, self._after, self.say)
        self._listener = listen(gate, address, cert, key, self.say)
        return self._listener.port

    def stop(self) -> None:
        """Let every waiting request go, and close the port."""
        self._over.set()
        for site in self.keys:
            self._wake(site)
        self._listener.stop()

    def _begin_run(self) -> None:
        """Create the run that messages belong to, with no code in it, and keep it alive."""
        self._run = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self._state.get_run_info(run_ids=[self._run])[0].primary_task_id
        self._state.claim_task(task)
        self._state.activate_task(task)

        def beat() -> None:
            while not self._over.wait(BEAT):
                self._state.acknowledge_task_heartbeat(task)

        threading.Thread(target=beat, daemon=True).start()

    # --- what the link asks for

    def online(self, site: str) -> bool:
        """Tell whether a site has given a sign of life lately."""
        (info,) = self._state.get_node_info(node_ids=[self._nodes[site]])
        return bool(info.status == NodeStatus.ONLINE)

    def silent(self, site: str) -> float | None:
        """Return for how many seconds a site has not been heard of; None: never heard of."""
        return time.monotonic() - self._seen[site] if site in self._seen else None

    def send(self, site: str, front: bytes, body: ArrayRecord) -> int:
        """Leave a message for a site, which gets it as soon as it asks; return its ticket."""
        with self._lock:
            number = int(next(self._numbers))
            self._tickets[number] = Ticket(site, front, body)
        self._wake(site)
        return number

    def _wake(self, site: str) -> None:
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._calls[site].set)

    def collect(self, numbers: Iterable[int]) -> tuple[int, bytes, int] | None:
        """Return one whole reply that has come, once: its ticket, itself, and how often its message was sent."""
        for number in list(numbers):
            with self._lock:
                ticket = self._tickets.get(number)
                contents = self._contents(ticket) if ticket else None
                if not ticket or contents is None:
                    continue
                name = self._reply_to(ticket)
                self.forget([number])
            return number, _opened(name, contents), ticket.sent
        return None

    def forget(self, numbers: Iterable[int]) -> None:
        """Close tickets; a reply that still comes is late and ignored."""
        with self._lock:
            for number in numbers:
                if ticket := self._tickets.pop(number, None):
                    self._withdraw(ticket)

    # --- messages in Flower's stores

    def _post(self, ticket: Ticket) -> bool:
        """Put a message into the stores, where the site's request finds it; False for a node that is not let in."""
        message = make_message(self._metadata(ticket.site), record(ticket.front, ticket.body))
        with no_object_id_recompute():  # each object is hashed once, and not once for every level above it
            _get_computed_object_ids().update(chunks(ticket.body))  # nor once for every site
            message.metadata.__dict__["_message_id"] = message.object_id
            objects, tree = get_all_nested_objects(message), get_object_tree(message)
            session = self._state.start_session(self._run)
            stored, missing = self._state.store_message_and_object_tree(message, tree, session)
            for name in missing:
                self._state.store_object(self._run, session, name, objects[name].deflate())
        ticket.message = message.metadata.message_id if stored else ""
        ticket.sent += bool(stored)
        return bool(stored)

    def _metadata(self, site: str) -> Metadata:
        return Metadata(self._run, "", SUPERLINK_NODE_ID, self._nodes[site], "", "", time.time(), TTL, "query")

    def _withdraw(self, ticket: Ticket) -> None:
        """Remove a message, its reply and what they hold."""
        if not ticket.message:
            return
        store = self._state.object_store
        reply = self._state.message_ins_id_to_message_res_id.get(ticket.message)
        self._state.delete_messages({ticket.message})
        for name in filter(None, (ticket.message, reply)):
            store.delete(name)
        ticket.message, ticket.coming = "", 0

    def _reply_to(self, ticket: Ticket) -> str:
        """Return the name of the reply to a ticket; empty while none is announced."""
        return self._state.message_ins_id_to_message_res_id.get(ticket.message) or ""

    def _contents(self, ticket: Ticket) -> dict[str, bytes] | None:
        """Return what the reply to a ticket is made of, once all of it is here."""
        name = self._reply_to(ticket)
        return self._whole(name) if name else None

    def _whole(self, name: str) -> dict[str, bytes] | None:
        """Return all objects of a reply; None while some are on their way."""
        store = self._state.object_store
        try:
            tree = store.get_object_tree(name)
        except NoObjectInStoreError:
            return None
        contents = {node.object_id: store.get(node.object_id) for node in iterate_object_tree(tree)}
        return contents if all(contents.values()) else None

    # --- what the gate asks for

    def _allowed(self, site: str, call: str, request: Any) -> None:
        """Refuse a request for another node, another key or another site's reply, and a reply that is too large."""
        own = self._nodes[site]
        if call == "activate-node":
            if request.public_key != self.keys[site].encode():
                raise Refused(401, f"{site} asked to come in with a key that is not its own")
            return
        if (request.node_id if call == "deactivate-node" else request.node.node_id) != own:
            raise Refused(410, f"{site} spoke of a node of an earlier start of this coordinator; it must come in again")
        if call == "push-messages":
            self._check_reply(site, request)

    def _check_reply(self, site: str, request: Any) -> None:
        metadata = [message.metadata for message in request.messages_list]
        if len(metadata) != 1 or metadata[0].src_node_id != self._nodes[site]:
            raise Refused(403, f"{site} sent a reply that is not its own")
        if _objects(request) > most_objects(self.most_bytes):
            raise Refused(413, f"{site} announced a reply of more than {self.most_bytes:,} bytes")
        with self._lock:
            known = any(t.message == metadata[0].reply_to_message_id and t.site == site for t in self._tickets.values())
        if not known:
            raise Refused(409, f"a reply of {site} came late or twice; it was not counted")

    async def _before(self, site: str, call: str, request: Any) -> None:
        if call == "pull-messages":
            await self._before_pull(site)
        elif call == "push-messages":
            await self._before_push(site, request)

    async def _before_pull(self, site: str) -> None:
        """Hold a site's request until there is a message for it; give it again what it has lost."""
        self._loop = asyncio.get_running_loop()
        self._note(site)
        until = time.monotonic() + HOLD
        while not await asyncio.to_thread(self._has_message, site):
            left = until - time.monotonic()
            if left <= 0 or self._over.is_set():
                return
            try:
                await asyncio.wait_for(self._calls[site].wait(), min(left, 1.0))
            except TimeoutError:
                continue
            finally:
                self._calls[site].clear()

    def _has_message(self, site: str) -> bool:
        """Post a site's first ticket that has no reply: a new one, or one that the site has lost."""
        with self._lock:
            for ticket in self._tickets.values():
                if ticket.site == site and not self._answered(ticket):
                    self._withdraw(ticket)
                    return self._post(ticket)
        return False

    def _answered(self, ticket: Ticket) -> bool:
        return self._contents(ticket) is not None

    async def _before_push(self, site: str, request: Any) -> None:
        """Let a reply wait until there is room for it; there always is for one."""
        size = CHUNK * max(0, _objects(request) - FEW)
        message, until = request.messages_list[0].metadata.reply_to_message_id, time.monotonic() + HOLD
        while size and not self._has_room(message, size):
            if time.monotonic() > until or self._over.is_set():
                raise Refused(BUSY, "the replies of other sites are taken first")
            await asyncio.sleep(0.2)

    def _has_room(self, message: str, size: int) -> bool:
        """Book room for a reply; that of a site which is away is free."""
        with self._lock:
            held = [
                t.coming for t in self._tickets.values() if t.coming and t.message != message and self._here(t.site)
            ]
            if held and sum(held) + size > self.room:
                return False
            for ticket in self._tickets.values():
                if ticket.message == message:
                    ticket.coming = size
        return True

    def _here(self, site: str) -> bool:
        return time.monotonic() - self._seen.get(site, 0.0) < 3 * BEAT

    def _after(self, site: str, call: str) -> None:
        self._note(site)

    def _note(self, site: str) -> None:
        self._seen[site] = time.monotonic()
        with self.changed:
            self.changed.notify_all()


def _objects(request: Any) -> int:
    """Return how many objects an announced reply has."""
    return sum(1 for _ in iterate_object_tree(request.message_object_trees[0]))


def _opened(name: str, contents: dict[str, bytes]) -> bytes:
    """Put a reply together; what it is made of is let go on the way."""
    try:
        return joined(inflate_object_from_contents(name, contents).content)
    except (ValueError, KeyError, TypeError):
        return b""  # which the reader of messages refuses in words


def _fleet(factory: Any) -> FastAPI:
    """Return an application that has Flower's Fleet API and nothing else of it."""
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.include_router(fleet_router)
    return app
