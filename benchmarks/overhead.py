"""What the network costs a round: seconds beyond training, and the coordinator's memory, by adapter and sites.

    python benchmarks/overhead.py [--parameters 100000 1000000] [--sites 3 10 30] [--rounds 2]

A coordinator in a process of its own for each row, which adds each update to the exact sum as a round does; all sites
as threads of one other process; TLS on loopback, real letters, no training: a site answers with an update as large as
what it got. Writes benchmarks/results/overhead.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from weft import identity
from weft.core.sums import Sum
from weft.core.types import Order, Reply
from weft.deploy.certificates import certificates
from weft.links import letters
from weft.links.flower import Flower
from weft.links.flower.hub import Hub
from weft.links.flower.node import Node
from weft.site.allocator import return_freed_memory

JOB = "0" * 64
TENSOR = 500_000  # numbers of one tensor of an adapter
HEAD = (
    "parameters",
    "sites",
    "MB both ways",
    "seconds a round",
    "CPU s of the coordinator",
    "its peak MB",
    "above its start, in updates",
    "s to open",
)


class Echo:
    """A site that trains nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, order: Order) -> Any:
        yield Reply(self.name, order.round, order.state, 1, 1, {"loss": 1.0})

    def answer(self, question: Any) -> Any:
        return {}


def sites(port: int, folder: Path) -> None:
    """Run all sites of a folder in threads."""
    for path in sorted(folder.glob("site-*.key")):
        node = Node(f"127.0.0.1:{port}", identity.load(path), folder / "ca.pem", lambda text: None, 600)

        def answer(content: bytes, name: str = path.stem) -> tuple[bytes, bool]:
            return letters.answer(Echo(name), content, JOB), False

        threading.Thread(target=node.serve, args=(answer,), daemon=True).start()
    time.sleep(3600)


def adapter(parameters: int) -> dict[str, dict[str, torch.Tensor]]:
    sizes = [min(TENSOR, parameters - start) for start in range(0, parameters, TENSOR)]
    return {"adapter": {f"w{i:03d}": torch.randn(size) for i, size in enumerate(sizes)}}


def memory() -> float:
    """Return the peak resident MB of this process alone; getrusage's begins with that of the parent."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def measure(parameters: int, count: int, rounds: int, room: int) -> list[str]:
    """Run rounds with a coordinator in this process, which adds each update to the sum as a round does."""
    bare = memory()
    return_freed_memory()  # as `weft serve` does
    keys = {f"site-{i:02d}": identity.new() for i in range(count)}
    folder = Path(tempfile.mkdtemp(prefix="weft-overhead-"))
    tls = certificates(folder, ["127.0.0.1"])
    start = time.perf_counter()
    hub = Hub({name: key.public for name, key in keys.items()}, lambda text: None, room=room << 20)
    port = hub.start(("127.0.0.1", 0), tls.cert, tls.key)
    opened = time.perf_counter() - start
    for name, key in keys.items():
        identity.save(key, folder / f"{name}.key")
    other = subprocess.Popen([sys.executable, __file__, "--serve-sites", str(port), str(folder)])
    link = Flower(hub, JOB, {name: (name,) for name in keys}, lambda text: None)
    seconds, own, sent = [], [], 0
    try:
        for number in range(rounds + 1):  # the first brings the sites in, and is not counted
            order = Order("train", number, tuple(keys), adapter(parameters))
            start, used, total, sent = time.perf_counter(), time.process_time(), Sum(), 0
            for reply in link.exchange(order):
                assert not reply.failure, reply.failure
                sent += reply.bytes_up + reply.bytes_down
                total.add(reply.update, reply.weight)
                del reply
            assert total.weight == count
            seconds.append(time.perf_counter() - start)
            own.append(time.process_time() - used)
    finally:
        other.kill()
        other.wait()
        hub.stop()
    return [
        f"{parameters:,}",
        str(count),
        f"{sent / 1e6:,.1f}",
        f"{statistics.median(seconds[1:]):.2f}",
        f"{statistics.median(own[1:]):.2f}",
        f"{memory():,.0f}",
        f"{(memory() - bare) / (4e-6 * parameters):.1f}" if parameters >= 1_000_000 else "",
        f"{opened:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--sites", type=int, nargs="*", default=[3, 10, 30])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--room", type=int, default=512, help="as of `weft serve`")
    parser.add_argument("--row", action="store_true", help="measure one row, here")
    parser.add_argument("--serve-sites", nargs=2, metavar=("PORT", "FOLDER"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.serve_sites:
        sites(int(given.serve_sites[0]), Path(given.serve_sites[1]))
        return
    if given.row:
        print(json.dumps(measure(given.parameters[0], given.sites[0], given.rounds, given.room)))
        return
    rows = []
    for parameters in given.parameters:
        for count in given.sites:
            options = ["--parameters", parameters, "--sites", count, "--rounds", given.rounds, "--room", given.room]
            command = [sys.executable, __file__, "--row", *map(str, options)]
            found = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            rows.append("| " + " | ".join(json.loads(found.splitlines()[-1])) + " |")
            print(rows[-1], flush=True)
            write(rows, given)


def write(rows: list[str], given: argparse.Namespace) -> None:
    text = [
        "# What the network costs",
        "",
        f"`python benchmarks/overhead.py --rounds {given.rounds}` on {platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[1]:.0f} from other work; TLS on loopback. The coordinator is a process of its own, all "
        "sites are threads of another, untrained. The coordinator holds the adapter, the order and the exact sum "
        f"(six updates), and takes {given.room} MB of replies at a time (`weft serve --room`).",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---:|" * len(HEAD),
        *rows,
    ]
    (Path(__file__).parent / "results" / "overhead.md").write_text("\n".join([*text, ""]), encoding="utf8")


if __name__ == "__main__":
    main()
