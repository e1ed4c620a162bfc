"""Kill, stop, cut off and impersonate the parties of a real federation; compare what is seen with what is expected.

    python benchmarks/failures.py [--outage 120] [--only WORD] [--folder DIR]

Real processes, TLS on loopback, a tiny model. The undisturbed run's adapter is what every survived failure must end
in, byte for byte. It ends by itself, and writes benchmarks/results/failures.md.
"""

import argparse
import hashlib
import os
import platform
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from weft import identity
from weft.deploy.demo import Party, free_port, lay_out, site_of, wait_for_port
from weft.job import load
from weft.journal import read as read_journal

SITES = ["hospital-a", "hospital-b", "hospital-c"]
ROUNDS = 5
LONGEST = 240.0  # seconds that any one event is waited for


class Unseen(Exception):
    """What was expected did not happen."""


@dataclass
class World:
    """The folders of a federation, and the processes of one scenario."""

    folder: Path
    port: int
    changes: dict[str, object] = field(default_factory=dict)
    parties: list[Party] = field(default_factory=list)

    @property
    def job(self) -> Path:
        return self.folder / "coordinator" / "job.yaml"

    def change(self, **sections: object) -> None:
        values = yaml.safe_load(self.job.read_text())
        self.job.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))

    def serve(self, resume: bool = False, extra: tuple[str, ...] = ()) -> Party:
        command = ["serve", "job.yaml", "--listen", f"127.0.0.1:{self.port}", "--exact", *extra]
        party = Party("coordinator", self.job.parent, [*command, *(["--resume"] if resume else [])], quiet)
        self.parties.append(party)
        party.start()
        wait_for_port(party, self.port)
        return party

    def site(self, name: str, port: int = 0, **given: str) -> Party:
        party = site_of(self.folder, name, port or self.port, load(self.job).hash(), quiet)
        for option, value in given.items():
            at = f"--{option}"
            if at in party.command:
                party.command[party.command.index(at) + 1] = value
            else:
                party.command += [at, value]
        self.parties.append(party)
        party.start()
        return party

    def sites(self, port: int = 0) -> dict[str, Party]:
        return {name: self.site(name, port) for name in SITES}

    def fresh(self) -> None:
        """Forget the runs of the scenario before, and keep keys and data."""
        for place in (self.job.parent / "runs", *(self.folder / name / f"weft-{name}" for name in SITES)):
            shutil.rmtree(place, ignore_errors=True)

    def adapter(self) -> str:
        path = self.job.parent / "runs" / "job" / "adapter" / "adapter_model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"

    def stop(self) -> None:
        for party in self.parties:
            if party.process and party.process.poll() is None:
                party.process.send_signal(signal.SIGCONT)
            party.stop()
        self.parties.clear()


def quiet(text: str) -> None:
    if "--verbose" in sys.argv:
        print(text, flush=True)


def until(what: str, true: Callable[[], object], longest: float = LONGEST) -> None:
    end = time.monotonic() + longest
    while not true():
        if time.monotonic() > end:
            raise Unseen(f"{what}: not within {longest:.0f} s")
        time.sleep(0.05)


def line(party: Party, text: str) -> None:
    """Wait for a line of a process."""

    def seen() -> bool:
        if any(text in said for said in party.lines):
            return True
        if party.process and party.process.poll() is not None:
            time.sleep(0.3)
            if not any(text in said for said in party.lines):
                raise Unseen(f"{party.name} ended without saying `{text}`: {' '.join(party.lines[-2:])}")
        return False

    until(f"{party.name} says `{text}`", seen)


def ended(party: Party) -> int:
    assert party.process
    until(f"{party.name} ends", lambda: party.process and party.process.poll() is not None)
    time.sleep(0.2)
    return int(party.process.returncode)


def kill(party: Party) -> None:
    assert party.process
    os.kill(party.process.pid, signal.SIGKILL)
    party.process.wait()


class Cable:
    """A way between sites and the coordinator that can be cut."""

    def __init__(self, to: int) -> None:
        self.to, self.whole, self.open = to, True, set[socket.socket]()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            if not self.whole:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                near.close()
                continue
            self.open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while part := one.recv(65536):
                other.sendall(part)
        except OSError:
            pass
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.whole = False
        for end in self.open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    def mend(self) -> None:
        self.whole = True


# --- scenarios: each returns what was seen


def undisturbed(world: World) -> str:
    serve, sites = world.serve(), world.sites()
    codes = [ended(party) for party in (serve, *sites.values())]
    return f"exit codes {codes}, adapter {world.adapter()[:12]}"


def site_killed(world: World) -> str:
    serve, sites = world.serve(), world.sites()
    for name, moment in (
        ("hospital-a", "loading"),
        ("hospital-b", "round 2: training"),
        ("hospital-c", "round 3: meas"),
    ):
        line(sites[name], moment)
        time.sleep(0.1)
        kill(sites[name])
        sites[name] = world.site(name)
    codes = [ended(party) for party in (serve, *sites.values())]
    return f"exit codes {codes}, adapter {world.adapter()[:12]}"


def coordinator_killed(world: World) -> str:
    serve = world.serve()
    time.sleep(1)
    kill(serve)
    sites = world.sites()
    serve = world.serve(resume=started(world))
    moments = ("round 1: training", "round 2: measuring", None, f"round {ROUNDS}: measuring")
    for moment in moments:
        if moment:
            line(sites["hospital-a"], moment)
        else:
            until("round 3 is committed", lambda: len(rounds(world)) > 3)
        kill(serve)
        serve = world.serve(resume=started(world))
    codes = [ended(party) for party in (serve, *sites.values())]
    return f"exit codes {codes}, rounds {rounds(world)}, adapter {world.adapter()[:12]}"


def rounds(world: World) -> list[int]:
    return [row["round"] for row in read_journal(world.job.parent / "runs" / "job" / "journal.jsonl")]


def started(world: World) -> bool:
    return (world.job.parent / "runs" / "job" / "run.json").is_file()


def outage(world: World) -> str:
    serve = world.serve()
    cable = Cable(world.port)
    sites = world.sites(cable.port)
    line(sites["hospital-a"], "round 2: training")
    cable.cut()
    time.sleep(OUTAGE)
    cable.mend()
    codes = [ended(party) for party in (serve, *sites.values())]
    return f"exit codes {codes}, adapter {world.adapter()[:12]}"


def stopped_past_deadline(world: World) -> str:
    world.change(failures={"on_client_failure": "drop", "deadline": 30.0})
    serve, sites = world.serve(), world.sites()
    line(sites["hospital-b"], "round 2: training")
    assert sites["hospital-b"].process
    os.kill(sites["hospital-b"].process.pid, signal.SIGSTOP)
    journal = world.job.parent / "runs" / "job" / "journal.jsonl"
    until("a round without hospital-b", lambda: any(row.get("dropped") for row in read_journal(journal)))
    os.kill(sites["hospital-b"].process.pid, signal.SIGCONT)
    codes = [ended(party) for party in (serve, *sites.values())]
    dropped = {row["round"]: list(row["dropped"]) for row in read_journal(journal) if row.get("dropped")}
    late = any("late or twice" in said for said in serve.lines)
    return f"exit codes {codes}, dropped {dropped}, late reply refused: {'yes' if late else 'no'}"


def changed_base(world: World) -> str:
    other = world.folder / "other-model"
    shutil.copytree(world.folder / "model", other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    serve = world.serve()
    own: dict[str, Any] = {"model": str(other)}
    sites = {name: world.site(name, **(own if name == "hospital-b" else {})) for name in SITES}
    codes = [ended(party) for party in (serve, *sites.values())]
    return f"exit codes {codes}: {serve.lines[-1]}"


def unknown_node(world: World) -> str:
    serve = world.serve()
    made = world.folder / "stranger.key"
    identity.save(identity.new(), made)
    site = world.site("hospital-a", key=str(made))
    code = ended(site)
    return f"exit {code}: {site.lines[-1]} // {said(serve, 'refused')}"


def wrong_key(world: World) -> str:
    """The key of another site of the same job."""
    serve = world.serve()
    site = world.site("hospital-a", key=str(world.folder / "hospital-b" / "hospital-b.key"))
    line(serve, "hospital-b")
    code = ended(site)
    serve_code = ended(serve)
    return f"exit {code}, coordinator {serve_code}: {site.lines[-1]} // {serve.lines[-1]}"


def wrong_ca(world: World) -> str:
    from weft.deploy.certificates import certificates

    serve = world.serve()
    other = certificates(world.folder / "other-certs", ["127.0.0.1"])
    site = world.site("hospital-a", ca=str(other.ca))
    code = ended(site)
    return f"exit {code}: {site.lines[-1]} // {said(serve, 'refused')}"


def plain_text(world: World) -> str:
    serve = world.serve()
    answer: int | str
    try:
        answer = httpx.post(f"http://127.0.0.1:{world.port}/v1/fleet/pull-messages", timeout=5).status_code
    except httpx.HTTPError as error:
        answer = type(error).__name__
    return f"client: {answer} // {said(serve, 'refused')}"


def other_apis(world: World) -> str:
    """Flower's Control and Runtime API, and its registration of nodes, with the right CA."""
    serve = world.serve()
    context = ssl.create_default_context(cafile=str(world.job.parent / "weft-certs" / "ca.pem"))
    with httpx.Client(verify=context) as client:
        paths = ("control/start-run", "control/register-node", "runtime/acquire-task", "fleet/register-node")
        codes = [client.post(f"https://127.0.0.1:{world.port}/v1/{path}").status_code for path in paths]
    return f"{codes} // {said(serve, 'refused')}"


def replayed(world: World) -> str:
    """A request of a real site, recorded and sent a second time; then the same an hour old."""
    import base64

    from weft.links.flower.gate import signed

    serve = world.serve()
    key = identity.load(world.folder / "hospital-a" / "hospital-a.key")
    context = ssl.create_default_context(cafile=str(world.job.parent / "weft-certs" / "ca.pem"))
    codes = []
    with httpx.Client(verify=context) as client:
        for moment in (time.time(), time.time() - 3600):
            stamp = f"{moment:.3f}"
            path, once = "/v1/fleet/send-node-heartbeat", hashlib.sha256(stamp.encode()).hexdigest()[:32]
            signature = base64.b64encode(key.sign(signed(path, stamp, once, b""))).decode()
            headers = {
                "x-weft-key": key.public,
                "x-weft-time": stamp,
                "x-weft-once": once,
                "x-weft-signature": signature,
            }
            codes += [client.post(f"https://127.0.0.1:{world.port}{path}", headers=headers).status_code for _ in "12"]
    until("the coordinator refuses", lambda: any("came twice" in text for text in serve.lines), 10)
    return f"{codes} // {said(serve, 'twice')} // {said(serve, 'clock')}"


def said(party: Party, text: str) -> str:
    until(f"{party.name} says {text}", lambda: any(text in said for said in party.lines), 15)
    return next(said for said in party.lines if text in said)


SCENARIOS: dict[str, tuple[Callable[[World], str], str, tuple[str, ...]]] = {
    "no failure": (undisturbed, "all end with 0", ("exit codes [0, 0, 0, 0]",)),
    "kill -9 of a site: loading, in training, measuring": (
        site_killed,
        "started again, it goes on; the same bytes",
        ("exit codes [0, 0, 0, 0]", "SAME"),
    ),
    "kill -9 of the coordinator: waiting, in round 1, measuring, after a commit, last round": (
        coordinator_killed,
        "--resume, every round once; the same bytes",
        ("exit codes [0, 0, 0, 0]", f"rounds {list(range(ROUNDS + 1))}", "SAME"),
    ),
    "every connection cut in training, and an outage": (
        outage,
        "nothing is lost; the same bytes",
        ("exit codes [0, 0, 0, 0]", "SAME"),
    ),
    "SIGSTOP of a site past the deadline": (
        stopped_past_deadline,
        "dropped in that round, its late reply refused, counted again later",
        ("exit codes [0, 0, 0, 0]", "['hospital-b']", "refused: yes"),
    ),
    "one changed bit in a site's base": (
        changed_base,
        "refused before round 1, by name",
        ("exit codes [3, ", "hospital-b: the base model or its vocabulary is not that of the others"),
    ),
    "unknown node": (unknown_node, "refused on both sides", ("exit 3", "does not name", "refused: a node at")),
    "the key of another site": (wrong_key, "refused by the site, with the reason", ("exit 3", "another key")),
    "wrong CA": (wrong_ca, "refused on both sides", ("exit 3", "is not signed by", "refused: a node sent")),
    "plain text on the TLS port": (plain_text, "refused on both sides", ("Error", "plain text")),
    "Flower's other APIs": (other_apis, "not there", ("[404, 404, 404, 404]", "which is not there")),
    "a request played again, an old request": (replayed, "refused", ("409, 401, 401]", "came twice", "clock of")),
}
OUTAGE = 30.0


@contextmanager
def federation(folder: Path) -> Iterator[World]:
    job = lay_out(folder, SITES)
    world = World(folder, free_port())
    world.change(rounds=ROUNDS, local={"lr": 0.01, "batch": 4, "steps": 30}, baselines=[])
    assert job == world.job
    try:
        yield world
    finally:
        world.stop()


def main() -> None:
    global OUTAGE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outage", type=float, default=30.0, help="seconds without a connection")
    parser.add_argument("--only", nargs="*", default=[""], help="scenarios whose names hold one of these words")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    OUTAGE = given.outage
    rows, bytes_, failed = dict[str, str](), "", 0
    with federation(given.folder or Path(tempfile.mkdtemp(prefix="weft-failures-"))) as world:
        plain = world.job.read_text()
        for name, (scenario, expected, marks) in SCENARIOS.items():
            if not any(word in name for word in given.only) and not (name == "no failure" and compared(given.only)):
                continue
            world.fresh()
            world.job.write_text(plain)
            start = time.monotonic()
            try:
                seen = scenario(world)
            except Unseen as error:
                seen = f"NOT SEEN: {error}"
            world.stop()
            bytes_ = bytes_ or world.adapter()[:12]
            good = all((f"adapter {bytes_}" if mark == "SAME" else mark) in seen for mark in marks)
            failed += not good
            seen = seen.replace(str(world.folder), "DIR")
            rows[name] = f"| {name} | {expected} | {seen} | {'yes' if good else '**no**'} |"
            write(rows)
            print(f"{'ok  ' if good else 'FAIL'} {time.monotonic() - start:6.1f} s  {name}\n       {seen}", flush=True)
    sys.exit(1 if failed else 0)


def compared(words: list[str]) -> bool:
    """Tell whether one of the chosen scenarios is compared with the undisturbed run."""
    return any("SAME" in marks for name, (_, _, marks) in SCENARIOS.items() if any(word in name for word in words))


def write(rows: dict[str, str]) -> None:
    """Write the table; scenarios that were not chosen now keep the row of their last run."""
    path = Path(__file__).parent / "results" / "failures.md"
    old = path.read_text(encoding="utf8").splitlines() if path.is_file() else []
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in old if line.startswith("| ")}
    found = {**kept, **rows}
    text = [
        "# What happens when something fails",
        "",
        f"`python benchmarks/failures.py --outage {OUTAGE:.0f}` on {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores: a coordinator and three sites as processes, TLS on loopback.",
        "",
        "| what is done | expected | seen | as expected |",
        "|---|---|---|---|",
        *(found[name] for name in SCENARIOS if name in found),
    ]
    path.write_text("\n".join([*text, ""]), encoding="utf8")


if __name__ == "__main__":
    main()
