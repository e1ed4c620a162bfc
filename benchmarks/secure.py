"""What secure aggregation costs: processor seconds, bytes and server memory, by parameters and clients.

    python benchmarks/secure.py [--parameters 100000 1000000] [--clients 3 10]

Each cell runs the real protocol in one process: all keys, shares, signatures and shares released, with one thread.
Where all clients' masks are cheap (clients^2 x parameters up to 3e9) all vectors are masked and the opened sum is
compared with the plain one; elsewhere two clients mask a full vector, which is what a client costs, the others a short
one, and the server takes off as many masks of full length as ever: such cells are marked. The peak memory of a server
is measured in a process of its own that sums and opens, and holds nothing of any client. Writes
benchmarks/results/secure.md.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weft import identity
from weft.core.ring import FIELDS, Code, RingSum, encode
from weft.core.types import Order, Question
from weft.links import wire
from weft.secure.coordinator import Agreement, Coordinator
from weft.secure.ledger import Ledger
from weft.secure.member import Member, answer
from weft.secure.setting import fingerprint

PARAMETERS, CLIENTS = (100_000, 1_000_000, 10_000_000, 50_000_000), (3, 10, 50, 100)
ALL = 3e9  # clients^2 x parameters up to which every client masks its whole vector
TENSOR = 500_000  # numbers of one tensor of an adapter
FACTS = ("client_s", "server_s", "lost_s", "up", "down", "whole")


@dataclass
class People:
    """The clients of a cell, and the time that their answers take."""

    members: dict[str, Member]
    silent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def ask(self, question: Question) -> list[Any]:
        lost = self.silent.get(question.kind)
        to = {name: content for name, content in question.body["to"].items() if name != lost}
        start = time.process_time()
        found = answer(self.members, replace(question, body={"to": to}))
        self.seconds += time.process_time() - start
        return [found]

    def exchange(self, order: Order) -> Any:
        raise NotImplementedError

    def fork(self) -> "People":
        """Return clients that go on from here, and leave these as they are."""
        members = {}
        for name, member in self.members.items():
            session = member._session
            assert session is not None
            copied: dict[str, Any] = {part: dict(getattr(session, part)) for part in ("public", "shares", "answered")}
            members[name] = replace(member, ledger=Ledger(), _session=replace(session, **copied))
        return People(members)


def layout(parameters: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return an update of clipped, LoRA-like numbers."""
    draw = torch.Generator().manual_seed(1)
    sizes = [min(TENSOR, parameters - start) for start in range(0, parameters, TENSOR)]
    scale = 0.5 / parameters**0.5
    return {"adapter": {f"w{i:03d}": torch.randn(size, generator=draw) * scale for i, size in enumerate(sizes)}}


def met(clients: int) -> tuple[People, Agreement, float, float]:
    """Let clients agree; return them, the agreement, seconds of all clients and seconds of the server."""
    names = tuple(f"site-{i:03d}" for i in range(clients))
    identities = {name: identity.new() for name in names}
    peers = {name: known.public for name, known in identities.items()}
    people = People({name: Member(name, identities[name], "job", peers, lambda number: names) for name in names})
    order = Order("train", 1, names, {}, cohort=names)
    start = time.process_time()
    agreement = Coordinator("job", peers).begin(people, order)
    return people, agreement, people.seconds, time.process_time() - start - people.seconds


def cell(parameters: int, base: tuple[People, Agreement, float, float]) -> dict[str, Any]:
    """Measure one cell; seconds are those of one client and of the server."""
    people, agreement = base[0].fork(), base[1]
    names, update = agreement.order.clients, layout(parameters)
    clients, known = len(names), Code(len(names), 1.0)
    whole = clients**2 * parameters <= ALL
    total, plain = RingSum(known, update), RingSum(known, update)
    short, seen = torch.zeros(1, dtype=torch.int32), fingerprint(agreement.order.state)
    masking = adding = 0.0
    measured = names if whole else names[:2]
    for name in names:
        member, shares = people.members[name], agreement.order.secure[name]
        if name not in measured:
            member.hide(1, shares, seen, short)
            continue
        start = time.process_time()
        vector = encode(update, 1, 1.0, known)
        hidden = member.hide(1, shares, seen, vector)
        masking += time.process_time() - start
        start = time.process_time()
        total.add({"ring": {"vector": hidden}}, 1)
        adding += time.process_time() - start
        plain.add({"ring": {"vector": vector}}, 1)
    sent = len(wire.pack({"ring": {"vector": total.vector}}))
    adapter = len(wire.pack(update))
    inbox = len(agreement.order.secure[names[0]]) * 4 / 3  # stands in the order as base64
    others = people.fork()
    start = time.process_time()
    record = agreement_of(agreement).finish(people, names, total.vector)
    opened = time.process_time() - start - people.seconds
    dividing = 0.0
    if whole:
        assert torch.equal(total.vector, plain.vector), "the opened sum is not the plain sum"
        start = time.process_time()
        total.divided()
        dividing = time.process_time() - start
    lost = None
    if clients > 3:  # one client less: what it adds to the opening
        again = agreement_of(agreement)
        start = time.process_time()
        again.finish(others, names[:-1], total.vector)
        lost = time.process_time() - start - others.seconds - opened * (clients - 1) / clients
    return {
        "client_s": base[2] / clients + masking / len(measured) + people.seconds / clients,
        "server_s": base[3] + adding * clients / len(measured) + opened + dividing,
        "lost_s": lost,
        "up": sent + record["bytes_up"] / clients,
        "down": adapter + inbox + record["bytes_down"] / clients,
        "whole": whole,
    }


def agreement_of(agreement: Agreement) -> Agreement:
    return replace(agreement, late={}, up=agreement.up.copy(), down=agreement.down.copy())


def memory(parameters: int, clients: int) -> None:
    """Sum and open in this process, as a server does, and print the peak above the start in updates."""
    from weft.secure import masks

    known, update = Code(clients, 1.0), layout(parameters)
    masks.add(torch.zeros(10, dtype=torch.int32), bytes(32), 1)
    before = peak()
    total = RingSum(known, update)
    for i in range(clients):
        reply = torch.empty(parameters + FIELDS, dtype=torch.int32).zero_()  # as it comes from the network
        total.add({"ring": {"vector": reply}}, 1)
        del reply
        masks.add(total.vector, i.to_bytes(32), -1)
        masks.add(total.vector, i.to_bytes(32), 1)
    total.vector[:-FIELDS] = 7
    total.vector[-FIELDS:] = torch.tensor([clients, 0])
    total.divided()
    grown = peak() - before
    print(json.dumps({"updates": grown * 1024 / (4 * parameters), "mb": grown / 1024}))


def peak() -> int:
    """Return this process's own peak resident memory in KiB; getrusage's begins with that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="utf8")
    return int(status.partition("VmHWM:")[2].split()[0])


def bytes_of(number: float) -> str:
    return f"{number / 1e6:.2f} MB" if number < 1e8 else f"{number / 1e6:.0f} MB"


def table(cells: dict[tuple[int, int], dict[str, Any]]) -> list[str]:
    lines = ["| parameters | clients | client s | server s | server s a lost client | up a client | down a client |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (parameters, clients), found in cells.items():
        mark = "" if found["whole"] else " *"
        lost = "-" if found["lost_s"] is None else f"{found['lost_s']:.3g}"
        size, seconds = f"{parameters / 1e6:g} M", f"{found['client_s']:.3g} | {found['server_s']:.3g} | {lost}"
        lines.append(f"| {size} | {clients}{mark} | {seconds} | {bytes_of(found['up'])} | {bytes_of(found['down'])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="*", default=PARAMETERS)
    parser.add_argument("--clients", type=int, nargs="*", default=CLIENTS)
    parser.add_argument("--memory", type=int, nargs=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "secure.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        memory(*given.memory)
        return
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for clients in given.clients:
        base = met(clients)
        for parameters in given.parameters:
            cells[parameters, clients] = cell(parameters, base)
            print(parameters, clients, cells[parameters, clients], flush=True)
    held = {}
    for parameters, clients in ((10_000_000, 3), (10_000_000, 50), (50_000_000, 3), (50_000_000, 20)):
        if parameters in given.parameters:
            command = [sys.executable, __file__, "--memory", str(parameters), str(clients)]
            held[parameters, clients] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    write(given.out, dict(sorted(cells.items())), held)


def write(path: Path, cells: dict[tuple[int, int], dict[str, Any]], held: dict[tuple[int, int], Any]) -> None:
    text = [
        "# Secure aggregation: what it costs",
        "",
        f"Processor seconds of one thread ({platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}), on a machine that was busy otherwise, for a round: keys, shares, masks, opening.",
        "`python benchmarks/secure.py` measures them.",
        "All clients stay; each lost one costs the server the fifth column more (its masks with all survivors).",
        "Up is the masked vector, four bytes a parameter, and all messages; down is a float32 adapter and all",
        "messages. In cells with * two of the clients mask a vector of full length and the others a short one: the",
        "seconds of a client and of the server are measured, the sum is not compared. In all other cells the opened",
        "sum is the plain sum, bit for bit. The server of cells with * does not divide the sum, which is no mean.",
        "",
        *table(cells),
        "",
        "## Memory of the server",
        "",
        "Peak above an idle server with the first adapter in memory. The running sum, one vector that arrives and the",
        "mean that comes out are three updates; the rest, up or down, is when the system gives memory back. It does",
        "not grow with the clients.",
        "",
        "| parameters | clients | peak, MB | peak, updates of 4 bytes a parameter |",
        "|---|---|---|---|",
        *(f"| {p / 1e6:g} M | {n} | {found['mb']:.0f} | {found['updates']:.2f} |" for (p, n), found in held.items()),
        "",
    ]
    path.write_text("\n".join(text), encoding="utf8")


if __name__ == "__main__":
    main()
