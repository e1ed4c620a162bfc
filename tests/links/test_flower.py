"""The link between real sites, over TLS on loopback: what every link must carry, and what must not pass."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

pytest.importorskip("flwr", reason='flwr is missing; install it with `pip install -e ".[deploy]"`')

from weft import identity
from weft.deploy.certificates import Certificates, certificates
from weft.links import letters
from weft.links.flower import Flower
from weft.links.flower.hub import Hub
from weft.links.flower.node import Node
from weft.testing import check_link
from weft.testing.toys import ToySite

JOB = "0" * 64


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certs"), ["127.0.0.1"])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


class World:
    """A hub, and sites that answer in threads of this process."""

    def __init__(self, tls: Certificates, stack: ExitStack) -> None:
        self.tls, self.stack, self.said = tls, stack, []

    def link(self, sites: Sequence[ToySite]) -> Flower:
        names = [f"site-{i}" for i in range(len(sites))]
        keys = {name: identity.new() for name in names}
        hub = Hub({name: key.public for name, key in keys.items()}, self.said.append)
        port = hub.start(("127.0.0.1", 0), self.tls.cert, self.tls.key)
        self.stack.callback(hub.stop)
        for name, site in zip(names, sites, strict=True):
            node = Node(f"127.0.0.1:{port}", keys[name], self.tls.ca, self.said.append, 5)
            self.stack.callback(node.stop)

            def answer(content: bytes, site: ToySite = site) -> tuple[bytes, bool]:
                return letters.answer(site, content, JOB), False

            threading.Thread(target=node.serve, args=(answer,), daemon=True).start()
        clients = {name: tuple(site.toy.clients) for name, site in zip(names, sites, strict=True)}
        return Flower(hub, JOB, clients, self.said.append)


def test_it_passes_what_every_link_passes(tls: Certificates, stack: ExitStack) -> None:
    """Bytes are those of whole letters here, which `test_the_ledger_counts_whole_letters` compares."""
    check_link(World(tls, stack).link, waive=("check_bytes",))
