"""A site's end: it connects outward, asks for messages, answers each in this process, and comes back after any outage.

Flower's client of the Fleet API carries the calls. Its SuperNode is not used: that one starts a Python process for
every message, gives up where the coordinator is away, and runs code that it is sent; here nothing that arrives is run.
"""

import base64
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node as NodeId
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from weft.core.errors import PolicyError, RunError
from weft.core.points import point
from weft.identity import Identity
from weft.links.flower.gate import BUSY, signed
from weft.links.flower.records import array, joined, most_objects, record

BEAT = 10.0  # seconds; a site that is silent for twice as long counts as away
ANSWER = 120.0  # seconds within which a request is answered, the coordinator's own wait for a message included
SLOWEST = 15.0  # seconds between two tries to reach the coordinator
PARTING = 60.0  # seconds for which the last reply is tried


class Away(Exception):
    """The coordinator does not answer, or no longer knows this node."""


@dataclass
class Node:
    """One site's connection to a coordinator."""

    address: str
    identity: Identity
    ca: Path
    say: Callable[[str], None]
    patience: float
    """Seconds for which it tries to reach a coordinator that is away."""
    most_bytes: int = 16 << 30
    """No message is larger."""
    _node: NodeId | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def serve(self, answer: Callable[[bytes], tuple[bytes, bool]]) -> None:
        """Answer messages until an answer says that it is the last.

        answer: message -> (reply, whether this was the last). Raise PolicyError where the coordinator refuses this
        site or is not the one that the CA vouches for, RunError where it has been away for too long.
        """
        with self._client() as self._fleet:
            beating = threading.Thread(target=self._beat, daemon=True)
            beating.start()
            try:
                while not self._over.is_set() and not self._turn(answer):
                    continue
            finally:
                self._over.set()
                self._leave()

    def stop(self) -> None:
        """End `serve`, at the latest when the request that is under way has been answered."""
        self._over.set()

    def _turn(self, answer: Callable[[bytes], tuple[bytes, bool]]) -> bool:
        """Ask for one message and answer it; return whether it was the last."""
        try:
            self._patiently(self._come_in)
            pulled = self._patiently(lambda: self._fleet.PullMessages(PullMessagesRequest(node=self._node)))
            if not pulled.messages_list:
                return False
            message, content = self._patiently(lambda: self._pull(pulled))
            reply, last = answer(content)
            if last:
                return self._part(message, reply)
            self._patiently(lambda: self._push(message, reply))
            point("sent")
        except Away as away:
            self._node = None
            if not self._over.is_set():
                self.say(str(away))
        return False

    def _part(self, message: Message, reply: bytes) -> bool:
        """Send the last reply, which nothing depends on: a coordinator that has left is not waited for."""
        with suppress(Away, RunError, PolicyError):
            self._patiently(lambda: self._push(message, reply), PARTING)
            point("sent")
        return True

    # --- the calls

    def _come_in(self) -> None:
        """Become a node of the coordinator, if this is not one already."""
        if self._node is None:
            request = ActivateNodeRequest(public_key=self.identity.public.encode(), heartbeat_interval=BEAT)
            self._node = NodeId(node_id=self._fleet.ActivateNode(request).node_id)
            self.say(f"connected to {self.address}")

    def _leave(self) -> None:
        if self._node is not None:
            try:
                self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (httpx.HTTPError, RuntimeError):
                return

    def _pull(self, pulled: Any) -> tuple[Message, bytes]:
        """Fetch all objects of a message, within the size that is allowed."""
        message, tree = message_from_proto(pulled.messages_list[0]), pulled.message_object_trees[0]
        names = [node.object_id for node in iterate_object_tree(tree)]
        if len(names) > most_objects(self.most_bytes):
            raise PolicyError(f"the coordinator sent a message of more than {self.most_bytes:,} bytes")
        assert self._node
        run = message.metadata.run_id
        contents = pull_objects(names, make_pull_object_fn_protobuf(self._fleet.PullObject, self._node, run))
        whole = inflate_object_from_contents(message.metadata.message_id, contents)
        content = joined(whole.content)
        confirm = make_confirm_message_received_fn_protobuf(self._fleet.ConfirmMessageReceived, self._node, run)
        confirm(message.metadata.message_id)
        return message, content

    def _push(self, message: Message, content: bytes) -> None:
        with no_object_id_recompute():  # each object is hashed once, and not once for every level above it
            self._push_objects(message, content)

    def _push_objects(self, message: Message, content: bytes) -> None:
        """Send a reply; one that the coordinator no longer waits for is said and dropped."""
        assert self._node
        reply = Message(record(content[:0], array(content)), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )
        try:
            response = self._fleet.PushMessages(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (403, 409, 413):
                self.say(f"not counted: {_detail(error)}")
                return
            raise
        push_objects(
            get_all_nested_objects(reply),
            make_push_object_fn_protobuf(
                self._fleet.PushObject, self._node, message.metadata.run_id, response.session_id
            ),
            object_ids_to_push=set(response.objects_to_push),
        )

    # --- outages

    def _patiently(self, call: Callable[[], Any], most: float | None = None) -> Any:
        """Make a call until it succeeds; raise Away where this must come in again, and the errors of `serve`.

        most: seconds to try; by default `patience`.
        """
        patience = self.patience if most is None else most
        began, wait, said = time.monotonic(), 0.5, False
        while True:
            try:
                result = call()
            except (httpx.TransportError, ObjectPullError, ObjectPushError) as error:
                _check_certificate(error, self.address, self.ca)
                problem = f"{self.address} cannot be reached ({_first(error)})"
                if not isinstance(error, httpx.TransportError):
                    raise Away(f"a message was lost on the way: {_first(error)}; asking for it again") from None
            except httpx.HTTPStatusError as error:
                problem = self._refusal(error)
            else:
                if said:
                    self.say(f"{self.address} answers again")
                return result
            if self._over.is_set():
                raise Away("stopped") from None
            away = time.monotonic() - began
            if away > patience:
                raise RunError(f"{problem}; tried for {away:.0f} s, as long as the policy's `patience` says") from None
            if not said:
                self.say(f"{problem}; trying again for {patience:.0f} s")
                said = True
            time.sleep(wait * (1 + secrets.randbelow(100) / 300))
            wait = min(2 * wait, SLOWEST)

    def _refusal(self, error: httpx.HTTPStatusError) -> str:
        """Return why it is worth to try again; raise where it is not."""
        status, detail = error.response.status_code, _detail(error)
        if status == 410 or (status in (400, 401, 403, 404) and self._node is not None and "node" in detail.lower()):
            raise Away(f"{self.address} has been started again; coming in again") from None
        if status in (401, 403, 404):
            raise PolicyError(f"{self.address} refused this site: {detail}") from None
        if status == BUSY:
            return detail
        if "2004" in detail or "activate" in detail.lower():
            return "another process with this key is connected, or the last one was killed a moment ago"
        return f"{self.address} answered {status}: {detail}"

    def _beat(self) -> None:
        """Give signs of life while this process computes."""
        while not self._over.wait(BEAT / 3):
            node = self._node
            if node is None:
                continue
            try:
                self._fleet.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=BEAT))
            except (httpx.HTTPError, RuntimeError):
                continue  # the next call of the main thread says what is wrong

    @contextmanager
    def _client(self) -> Iterator[FleetHttpClient]:
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
        except (OSError, ssl.SSLError) as error:
            raise PolicyError(f"--ca {self.ca}: is no certificate of a CA ({_first(error)})") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with FleetHttpClient(
            f"https://{self.address}", interceptors=[_Signing(self.identity)], verify=context, timeout=ANSWER
        ) as client:
            client._client.follow_redirects = False
            yield client


@dataclass(frozen=True)
class _Signing:
    """Signs each request with the site's key."""

    identity: Identity

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the key, the time, a number used once and the signature over them, the path and the body."""
        request, moment, once = context.request, f"{time.time():.3f}", secrets.token_hex(16)
        signature = self.identity.sign(signed(request.url.path, moment, once, request.content))
        request.headers.update(
            {
                "x-weft-key": self.identity.public,
                "x-weft-time": moment,
                "x-weft-once": once,
                "x-weft-signature": base64.b64encode(signature).decode(),
            }
        )
        response: httpx.Response = call_next(context)
        return response


def _check_certificate(error: BaseException, address: str, ca: Path) -> None:
    """Raise PolicyError for a certificate that no waiting will mend."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, ssl.SSLError):
        return
    text = str(cause)
    if "Hostname mismatch" in text or "IP address mismatch" in text:
        raise PolicyError(f"the certificate of {address} is for another name; use the name that the coordinator gave")
    if "expired" in text or "not yet valid" in text:
        raise PolicyError(
            f"the certificate of {address} is not valid now; check this machine's clock, then the coordinator"
        )
    if "CERTIFICATE_VERIFY_FAILED" in text:
        raise PolicyError(
            f"the certificate of {address} is not signed by {ca}: wrong CA file, or not the coordinator; "
            "get ca.pem from the coordinator by a way that you trust"
        )
    if "WRONG_VERSION_NUMBER" in text:
        raise PolicyError(f"{address} speaks no TLS: this is not a coordinator of Weft")


def _detail(error: httpx.HTTPStatusError) -> str:
    try:
        values = error.response.json()
        return str(values.get("detail") or values.get("message") or values)[:300]
    except ValueError:
        return error.response.text[:300]


def _first(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
