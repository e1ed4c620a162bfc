"""What the network costs a round: seconds beyond training, and the coordinator's memory, by adapter and sites.

    python benchmarks/overhead.py [--parameters 100000 1000000] [--sites 3 10 30] [--rounds 2]

A coordinator in this process, sites as threads of one other process; TLS on loopback, real letters, no training: a
site answers with an update as large as what it got. Writes benchmarks/results/overhead.md.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from weft import identity
from weft.core.types import Order, Reply
from weft.deploy.certificates import certificates
from weft.links import letters
from weft.links.flower import Flower
from weft.links.flower.hub import Hub
from weft.links.flower.node import Node

JOB = "0" * 64


class Echo:
    """A site that trains nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, order: Order) -> Any:
        yield Reply(self.name, order.round, order.state, 1, 1, {"loss": 1.0})

    def answer(self, question: Any) -> Any:
        return {}


def sites(port: int, ca: Path, keys: dict[str, identity.Identity]) -> None:
    """Run all sites in threads."""
    for name, key in keys.items():
        node = Node(f"127.0.0.1:{port}", key, ca, lambda text: None, 60)

        def answer(content: bytes, name: str = name) -> tuple[bytes, bool]:
            return letters.answer(Echo(name), content, JOB), False

        threading.Thread(target=node.serve, args=(answer,), daemon=True).start()
    time.sleep(3600)


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(parameters: int, count: int, rounds: int) -> list[str]:
    keys = {f"site-{i:02d}": identity.new() for i in range(count)}
    tls = certificates(Path(tempfile.mkdtemp(prefix="weft-overhead-")), ["127.0.0.1"])
    start = time.perf_counter()
    hub = Hub({name: key.public for name, key in keys.items()}, lambda text: None)
    port = hub.start(("127.0.0.1", 0), tls.cert, tls.key)
    opened = time.perf_counter() - start
    other = multiprocessing.get_context("fork").Process(target=sites, args=(port, tls.ca, keys), daemon=True)
    other.start()
    link = Flower(hub, JOB, {name: (name,) for name in keys}, lambda text: None)
    seconds, own = [], []
    for number in range(rounds + 1):  # the first brings the sites in, and is not counted
        order = Order("train", number, tuple(keys), {"adapter": {"w": torch.randn(parameters)}})
        start, used = time.perf_counter(), time.process_time()
        replies = list(link.exchange(order))
        assert len(replies) == count
        assert not any(reply.failure for reply in replies)
        seconds.append(time.perf_counter() - start)
        own.append(time.process_time() - used)
    other.kill()
    other.join()
    hub.stop()
    sent = sum(reply.bytes_up + reply.bytes_down for reply in replies) / 1e6
    return [
        f"{parameters:,}",
        str(count),
        f"{sent:,.1f}",
        f"{statistics.median(seconds[1:]):.2f}",
        f"{statistics.median(own[1:]):.2f}",
        f"{memory():,.0f}",
        f"{opened:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--sites", type=int, nargs="*", default=[3, 10, 30])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--most", type=int, default=100_000_000, help="parameters of all sites together: memory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = [
        "parameters",
        "sites",
        "MB both ways",
        "seconds a round",
        "CPU s of the coordinator",
        "peak MB so far",
        "s to open",
    ]
    rows = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for parameters in given.parameters:
        for count in given.sites:
            if parameters * count <= given.most:
                rows.append("| " + " | ".join(measure(parameters, count, given.rounds)) + " |")
                print(rows[-1], flush=True)
                write(rows)


def write(rows: list[str]) -> None:
    text = [
        "# What the network costs",
        "",
        f"`python benchmarks/overhead.py` on {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[1]:.0f} from other work; TLS on loopback, all sites as threads of one process, untrained. "
        f"A process with torch alone has {BARE:,.0f} MB.",
        "",
        *rows,
    ]
    (Path(__file__).parent / "results" / "overhead.md").write_text("\n".join([*text, ""]), encoding="utf8")


BARE = memory()

if __name__ == "__main__":
    main()
