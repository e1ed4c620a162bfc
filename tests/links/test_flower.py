"""The link between real sites, over TLS on loopback: what every link must carry, and what must not pass."""

import base64
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import pytest

pytest.importorskip("flwr", reason='flwr is missing; install it with `pip install -e ".[deploy]"`')

import httpx
import torch

from weft import identity
from weft.core.errors import PolicyError, RunError, WeftError
from weft.core.types import Order, Question
from weft.deploy.certificates import Certificates, certificates
from weft.links import letters
from weft.links.flower import Flower
from weft.links.flower.gate import signed
from weft.links.flower.hub import Hub, Ticket
from weft.links.flower.node import Node
from weft.links.flower.records import array
from weft.testing import check_link, toys
from weft.testing.links import _order, _sites
from weft.testing.sound import bits
from weft.testing.toys import ToySite

JOB = "0" * 64
KEYS = {f"site-{i}": identity.new() for i in range(5)}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certs"), ["127.0.0.1"])


class World:
    """A hub, and sites that answer in threads of this process."""

    def __init__(self, tls: Certificates, stack: ExitStack) -> None:
        self.tls, self.stack, self.said = tls, stack, list[str]()

    def hub(self, names: Sequence[str] = tuple(KEYS)) -> Hub:
        hub = Hub({name: KEYS[name].public for name in names}, self.said.append)
        self.port = hub.start(("127.0.0.1", 0), self.tls.cert, self.tls.key)
        self.stack.callback(hub.stop)
        return hub

    def node(self, name: str, patience: float = 5, **other: identity.Identity) -> Node:
        node = Node(f"127.0.0.1:{self.port}", other.get("key", KEYS[name]), self.tls.ca, self.said.append, patience)
        self.stack.callback(node.stop)
        return node

    def run(self, name: str, site: ToySite, wait: float = 0.0) -> Node:
        node = self.node(name)

        def answer(content: bytes) -> tuple[bytes, bool]:
            time.sleep(wait)
            return letters.answer(site, content, JOB), False

        def serve() -> None:
            with suppress(WeftError):
                node.serve(answer)

        threading.Thread(target=serve, daemon=True).start()
        return node

    def link(self, sites: Sequence[ToySite]) -> Flower:
        names = list(KEYS)[: len(sites)]
        hub = self.hub(names)
        for name, site in zip(names, sites, strict=True):
            self.run(name, site)
        return Flower(hub, JOB, self.clients(sites), self.said.append)

    def clients(self, sites: Sequence[ToySite]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(site.toy.clients) for name, site in zip(KEYS, sites, strict=False)}

    def post(self, path: str, key: identity.Identity, body: bytes = b"", **changed: str) -> httpx.Response:
        """Send one signed request, with some headers changed."""
        moment = changed.get("time", f"{time.time():.3f}")
        once = changed.get("once", base64.b16encode(torch.rand(4).numpy().tobytes()).decode())
        content = signed(changed.get("signed", path), moment, once, body)
        headers = {
            "x-weft-key": key.public,
            "x-weft-time": moment,
            "x-weft-once": once,
            "x-weft-signature": base64.b64encode(key.sign(content)).decode(),
            "content-type": "application/protobuf",
        }
        context = ssl.create_default_context(cafile=str(self.tls.ca))
        return httpx.post(f"https://127.0.0.1:{self.port}{path}", content=body, headers=headers, verify=context)


@pytest.fixture
def world(tls: Certificates) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tls, stack)


def test_it_passes_what_every_link_passes(world: World) -> None:
    check_link(world.link)


def test_the_ledger_counts_whole_letters(world: World) -> None:
    sites = _sites("ab", "c", "de")
    link = world.link(sites)
    fronts, body = letters.order_letters(JOB, _order(), world.clients(sites))
    expected = {c: len(fronts[site]) + len(body) for site, own in world.clients(sites).items() for c in own[:1]}
    replies = {reply.client: reply for reply in link.exchange(_order())}
    assert {name: replies[name].bytes_down for name in expected} == expected
    assert sum(reply.bytes_down for reply in replies.values()) == sum(expected.values())
    up = len(letters.answer(_sites("c")[0], fronts["site-1"] + body, JOB))
    assert replies["c"].bytes_up == up


def test_a_late_site_is_lost_and_its_late_reply_is_refused(world: World) -> None:
    sites = _sites("ab", "c")
    slow = world.hub(["site-0", "site-1"])
    world.run("site-0", sites[0])
    world.run("site-1", sites[1], wait=6)
    link = Flower(slow, JOB, world.clients(sites), world.said.append, deadline=4.0)
    order = Order("train", 1, ("a", "b", "c"), {"adapter": toys.adapter()}, dict.fromkeys("abc", 0))
    replies = {reply.client: reply.failure for reply in link.exchange(order)}
    assert replies["a"] is None
    assert replies["b"] is None
    assert "gave no reply within 4 s, the job's failures.deadline" in str(replies["c"])
    assert _within(10, lambda: any("late or twice" in text for text in world.said))
    assert _within(10, lambda: any(text.startswith("not counted") for text in world.said))


def test_a_site_that_lost_its_order_gets_it_again(world: World) -> None:
    """It takes the order, dies without a word, comes again as another process, and the reply is the same."""
    site = _sites("ab")[0]
    hub = world.hub(["site-0"])
    link = Flower(hub, JOB, world.clients([site]), world.said.append)
    died = world.node("site-0")

    def die(content: bytes) -> tuple[bytes, bool]:
        died.stop()
        raise SystemExit

    def once() -> None:
        with suppress(SystemExit):
            died.serve(die)
        world.run("site-0", site)

    threading.Thread(target=once, daemon=True).start()
    order = Order("train", 1, ("a", "b"), {"adapter": toys.adapter()}, {"a": 0, "b": 0})
    got = {reply.client: bits(reply.update) for reply in link.exchange(order)}
    assert got == {reply.client: bits(reply.update) for reply in _sites("ab")[0].handle(order)}


def test_a_question_with_receivers_is_cut_to_each_site(world: World) -> None:
    """A site that speaks for another one's clients is not heard, and one without any is not asked."""
    sites, asked = _sites("ab", "c", "d"), list[tuple[str, ...]]()

    def answer(question: Question) -> dict[str, bytes]:
        asked.append(tuple(question.body["to"]))
        return {**question.body["to"], "c" if "a" in question.body["to"] else "a": b"false"}

    for site in sites:
        site.answer = answer  # type: ignore[method-assign]
    link = world.link(sites)
    body = {"to": {"a": b"1", "b": b"2", "c": b"3"}, "word": torch.ones(2)}
    assert link.ask(Question("toy", body)) == [{"a": b"1", "b": b"2"}, {"c": b"3"}]
    assert sorted(asked) == [("a", "b"), ("c",)]


def test_replies_that_wait_for_room_all_come(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one reply, and none counts as small: they come one after the other, bit for bit."""
    monkeypatch.setattr("weft.links.flower.hub.FEW", 0)
    sites = _sites("ab", "c", "de")
    link = world.link(sites)
    link.hub.room = 1
    assert {reply.client for reply in link.exchange(_order()) if reply.failure is None} == set("abcde")
    assert not any("refused" in text for text in world.said)


def test_room_is_booked_once_and_given_back() -> None:
    body, now = array(b""), time.monotonic()
    hub = Hub({name: KEYS[name].public for name in ("site-0", "site-1")}, lambda text: None, room=100)
    hub._tickets = {0: Ticket("site-0", b"", body, "first"), 1: Ticket("site-1", b"", body, "second")}
    hub._seen = {"site-0": now, "site-1": now}
    assert hub._has_room("first", 1000)  # one always has room
    assert hub._has_room("first", 1000)  # announced again, after a lost answer
    assert not hub._has_room("second", 1)
    hub._seen["site-0"] = now - 60  # gone in the middle of it
    assert hub._has_room("second", 1)
    hub._tickets[1].coming = 0
    hub._seen["site-0"] = now
    assert not hub._has_room("second", 1)
    del hub._tickets[0]  # collected
    assert hub._has_room("second", 1)


def test_a_restarted_coordinator_is_found_again(world: World, tls: Certificates) -> None:
    site = _sites("ab")[0]
    first = world.hub(["site-0"])
    port = world.port
    world.run("site-0", site)
    order = Order("train", 1, ("a", "b"), {"adapter": toys.adapter()}, {"a": 0, "b": 0})
    assert len(list(Flower(first, JOB, world.clients([site]), world.said.append).exchange(order))) == 2
    first.stop()
    second = Hub({"site-0": KEYS["site-0"].public}, world.said.append)
    second.start(("127.0.0.1", port), tls.cert, tls.key)
    world.stack.callback(second.stop)
    assert len(list(Flower(second, JOB, world.clients([site]), world.said.append).exchange(order))) == 2


# --- what must not pass


def test_only_eight_calls_are_there(world: World) -> None:
    world.hub()
    paths = ("control/start-run", "control/register-node", "runtime/acquire-task", "fleet/register-node")
    for path in (*paths, "fleet/get-fab", "fleet/unregister-node", "fleet/../control/start-run"):
        assert world.post(f"/v1/{path}", KEYS["site-0"]).status_code == 404
    assert world.post("/v1/fleet/pull-messages", KEYS["site-0"]).status_code == 410  # signed, but for no node


def test_signatures_bind_key_path_body_and_time(world: World) -> None:
    world.hub()
    path, key = "/v1/fleet/send-node-heartbeat", KEYS["site-0"]
    good = world.post(path, key, once="1")
    assert good.status_code == 410
    assert world.post(path, key, once="1").status_code == 409
    assert world.post(path, identity.new()).status_code == 401
    assert world.post(path, key, signed="/v1/fleet/pull-object").status_code == 401
    for wrong in (f"{time.time() - 400:.3f}", f"{time.time() + 400:.3f}", "", "nan", "1e400"):
        assert world.post(path, key, time=wrong).status_code == 401, wrong
    assert "came twice" in " ".join(world.said)
    assert "the clock of site-0 is" in " ".join(world.said)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(world: World) -> None:
    world.hub()
    assert world.post("/v1/fleet/push-object", KEYS["site-0"], bytes(7 << 20)).status_code == 413


def test_a_site_cannot_speak_for_another(world: World) -> None:
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
    from flwr.proto.node_pb2 import Node as NodeId

    hub = world.hub()
    other = PullMessagesRequest(node=NodeId(node_id=hub._nodes["site-1"])).SerializeToString()
    assert world.post("/v1/fleet/pull-messages", KEYS["site-0"], other).status_code == 410
    key = KEYS["site-1"].public.encode()
    body = ActivateNodeRequest(public_key=key, heartbeat_interval=10).SerializeToString()
    assert world.post("/v1/fleet/activate-node", KEYS["site-0"], body).status_code == 401
    assert world.post("/v1/fleet/activate-node", KEYS["site-1"], body).status_code == 200


@pytest.mark.parametrize(
    ("case", "says"), [("key", "does not name"), ("ca", "is not signed by"), ("plain", "speaks no TLS")]
)
def test_a_site_is_told_why_in_one_sentence(
    world: World, case: str, says: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world.hub()
    node = world.node("site-0", key=identity.new()) if case == "key" else world.node("site-0")
    if case == "ca":
        node.ca = certificates(tmp_path_factory.mktemp("other"), ["127.0.0.1"]).ca
    if case == "plain":
        node.address = f"127.0.0.1:{_plain_server(world.stack)}"
    with pytest.raises(PolicyError, match=says):
        node.serve(lambda content: (b"", True))
    if case != "plain":
        assert _within(5, lambda: any(text.startswith("refused:") for text in world.said))


def test_plain_text_is_named_at_the_coordinator(world: World) -> None:
    world.hub()
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{world.port}/", timeout=5)
    assert _within(5, lambda: any("plain text" in text for text in world.said))


def test_a_coordinator_that_stays_away_is_given_up_after_patience(world: World) -> None:
    world.port = 1
    with pytest.raises(RunError, match="as long as the policy's `patience` says"):
        world.node("site-0", patience=0.1).serve(lambda content: (b"", True))


def _plain_server(stack: ExitStack) -> int:
    import socket

    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def greet() -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                with near:
                    near.recv(100)
                    near.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=greet, daemon=True).start()
    return int(server.getsockname()[1])


def _within(seconds: float, true: object) -> bool:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("last", [True, False])
def test_a_site_ends_with_its_last_reply_though_the_coordinator_has_left(
    world: World, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other reply is tried for as long as the site is patient, here longer than the test looks."""
    monkeypatch.setattr("weft.links.flower.node.PARTING", 0.5)
    hub, node = world.hub(["site-0"]), world.node("site-0", patience=60)

    def answer(content: bytes) -> tuple[bytes, bool]:
        hub.stop()
        return b"", last

    def serve() -> None:
        with suppress(WeftError):
            node.serve(answer)

    site = threading.Thread(target=serve, daemon=True)
    site.start()
    Flower(hub, JOB, {"site-0": ("a",)}, world.said.append).send("site-0", "end", reason=None, adapter={})
    site.join(8)
    assert site.is_alive() is not last
