"""Secure aggregation between real processes: the bits of the sum, a drop-out in each phase, what the coordinator holds.

    python benchmarks/secure_sites.py [--only WORD ...] [--folder DIR] [--verbose]

A coordinator and four sites as processes, TLS on loopback, a tiny model, `--exact`. The adapter of a simulation whose
ring has no masks is what every run must end in, byte for byte; where a site drops out before its vector is counted, it
is that of a simulation that loses the same client in the same round. A site kills itself at a fault point of the code
as it is. The coordinator is stopped while it holds the updates, and all of its memory that can be read is searched.
It ends by itself, and writes benchmarks/results/secure_sites.md.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from failures import Unseen, ended, quiet, until

from weft.deploy.demo import Party, free_port, lay_out, site_of, wait_for_port
from weft.job import load
from weft.journal import read as read_journal

SITES = ["hospital-a", "hospital-b", "hospital-c", "hospital-d"]
LOST = "hospital-b"
RING: list[Any] = ["delta", {"clip": {"norm": 2.0}}, {"weigh": {"cap": 16}}, "ring"]
NOISE: list[Any] = [
    *RING[:2],
    {"weigh": {"by": "uniform"}},
    "ring",
    {"discrete_noise": {"multiplier": 1.0, "colluders": 1}},
]
DEADLINE = 40.0  # seconds for a phase; a killed site that is back at once must load its base within it
PHASES = {
    "keys": "asked:secure.keys",
    "shares": "asked:secure.shares",
    "vector": "asked:train",
    "consistency": "asked:secure.consistency",
    "unmask": "asked:secure.unmask",
}
"""Phase of a round -> the fault point at which a site has been asked for its part."""
WINDOW, WINDOWS = 64, 4  # bytes that are searched for, and how many such pieces of each vector
RESULT = Path(__file__).parent / "results" / "secure_sites.md"


# --- inside a party: weft as it is, with a listener at its fault points


def inside(spec: dict[str, Any], command: list[str]) -> None:
    """Run a command of weft in this process, and kill, stop or note as the spec says."""
    from weft import cli
    from weft.core.points import listening

    if spec.get("seen"):
        note(Path(spec["seen"]))
    sys.argv = ["weft", *command]
    with listening(killing(spec.get("kill"), bool(spec.get("after")))), listening(stopping(spec.get("stop", []))):
        cli.main()


def killing(at: str | None, after: bool) -> Callable[[str], None]:
    """Kill this process where it is asked for the first time, or once it has sent its answer to that."""
    reached: list[str] = []

    def listen(name: str) -> None:
        if name == at:
            reached.append(name)
        if reached and (name == at if not after else name == "sent"):
            os.kill(os.getpid(), signal.SIGKILL)

    return listen


def stopping(at: list[str]) -> Callable[[str], None]:
    """Stop this process, until somebody lets it go on, at the points of a list, each once."""
    left = list(at)

    def listen(name: str) -> None:
        if left and name.startswith(left[0]):
            left.pop(0)
            print(f"stopped at {name}", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    return listen


def note(folder: Path) -> None:
    """Keep what leaves this site's training in the first round: floats, integers of the ring, and the masked vector."""
    from weft.core import trees
    from weft.secure.member import Member
    from weft.transforms import ring

    encode, hide = vars(ring)["encode"], Member.hide

    def encoded(update: Any, *rest: Any) -> Any:
        keep("floats", b"".join(t.numpy().tobytes() for t in trees.flatten(update).values()))
        vector = encode(update, *rest)
        keep("ring", vector.numpy().tobytes())
        return vector

    def hidden(self: Member, *given: Any) -> Any:
        vector = hide(self, *given)
        keep("masked", vector.numpy().tobytes())
        return vector

    def keep(name: str, content: bytes) -> None:
        if not (folder / name).is_file():
            (folder / name).write_bytes(content)

    vars(ring)["encode"] = encoded
    Member.hide = hidden  # type: ignore[method-assign, assignment]


# --- from outside


@dataclass
class World:
    """The folders of a federation, and the processes of one scenario."""

    folder: Path
    port: int
    parties: list[Party] = field(default_factory=list)

    @property
    def job(self) -> Path:
        return self.folder / "coordinator" / "job.yaml"

    @property
    def run(self) -> Path:
        return self.job.parent / "runs" / "job"

    def change(self, **sections: Any) -> None:
        values = yaml.safe_load(self.job.read_text())
        self.job.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))

    def start(self, party: Party, **spec: Any) -> Party:
        party.program = (str(Path(__file__).resolve()), "--inside", json.dumps(spec))
        self.parties.append(party)
        party.start()
        return party

    def serve(self, *extra: str, **spec: Any) -> Party:
        command = ["serve", "job.yaml", "--listen", f"127.0.0.1:{self.port}", *extra]
        party = self.start(Party("coordinator", self.job.parent, command, quiet), **spec)
        wait_for_port(party, self.port)
        return party

    def site(self, name: str, **spec: Any) -> Party:
        return self.start(site_of(self.folder, name, self.port, load(self.job).hash(), quiet), **spec)

    def fresh(self) -> None:
        for place in (self.run.parent, *(self.folder / name / f"weft-{name}" for name in SITES)):
            shutil.rmtree(place, ignore_errors=True)

    def stop(self) -> None:
        for party in self.parties:
            if party.process and party.process.poll() is None:
                party.process.send_signal(signal.SIGCONT)
            party.stop()
        self.parties.clear()

    def rows(self) -> list[dict[str, Any]]:
        return read_journal(self.run / "journal.jsonl")


def digest(folder: Path) -> str:
    path = folder / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "none"


def simulated(world: World, lost: bool) -> str:
    """Return the adapter of a simulation on the sites' records whose ring has no masks."""
    import weft
    from weft.core.types import Order, Reply
    from weft.site.site import Site

    values = yaml.safe_load(world.job.read_text())
    del values["sites"]
    for part in ("train", "test"):
        lines = [
            (name, line) for name in SITES for line in (world.folder / name / f"{part}.jsonl").read_text().splitlines()
        ]
        rows = [json.loads(line) | {"site": name} for name, line in lines]
        (world.folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values["data"][part] = f"{part}.jsonl"
    values["data"]["split"] = {"by": "site"}
    values["model"]["name"] = "model"
    handle = Site.handle

    def losing(site: Site, order: Order) -> Iterator[Reply]:
        for reply in handle(site, order):
            gone = lost and order.kind == "train" and (reply.client, reply.round) == (LOST, 1)
            yield Reply(LOST, 1, failure="lost") if gone else reply

    Site.handle = losing  # type: ignore[method-assign, assignment]
    try:
        job = weft.Job(**values | {"pipeline": RING, "folder": world.folder})
        return digest(weft.run(job, world.folder / f"simulated-{lost}", exact=True, report=False).folder)
    finally:
        Site.handle = handle  # type: ignore[method-assign]


# --- scenarios: each returns what was seen, and whether it is as it should be


@dataclass(frozen=True)
class Seen:
    text: str
    good: bool


def everyone(world: World, same: dict[bool, str]) -> Seen:
    serve = world.serve("--exact")
    parties = [serve, *(world.site(name) for name in SITES)]
    codes = [ended(party) for party in parties]
    row, found = world.rows()[1]["secure"], digest(world.run)
    good = codes == [0] * 5 and found == same[False] and row["survivors"] == 4
    return Seen(f"exit codes {codes}, {row['survivors']} survivors, adapter {found}", good)


def dropped(phase: str, after: bool) -> Callable[[World, dict[bool, str]], Seen]:
    """One site is killed in the first round: before its answer, and it stays away; or after it, and is back at once."""

    def scenario(world: World, same: dict[bool, str]) -> Seen:
        serve = world.serve("--exact")
        parties = {name: world.site(name) for name in SITES if name != LOST}
        victim = world.site(LOST, kill=PHASES[phase], after=after)
        assert ended(victim) == -signal.SIGKILL
        if not after:
            until("round 1 is committed without it", lambda: len(world.rows()) > 1)
        parties[LOST] = world.site(LOST)
        codes = [ended(party) for party in (serve, *parties.values())]
        first, second = world.rows()[1:]
        out, late = list(first["dropped"]), list(first["secure"]["late"])
        counted = phase in ("consistency", "unmask") or (phase == "vector" and after)
        found = digest(world.run)
        good = (
            codes == [0] * 5
            and found == same[not counted]
            and out == ([] if counted else [LOST])
            and first["secure"]["survivors"] == (4 if counted else 3)
            and second["secure"]["survivors"] == 4
        )
        told = f"not in the sum: {', '.join(out) or 'nobody'}; late: {', '.join(late) or 'nobody'}"
        return Seen(
            f"{told}; survivors {first['secure']['survivors']}, then {second['secure']['survivors']}; adapter {found}",
            good,
        )

    return scenario


def too_few(world: World, same: dict[bool, str]) -> Seen:
    """Two of four are killed before they send shares; the run ends, and is resumed with all of them."""
    serve = world.serve("--exact")
    left = [world.site(name) for name in SITES[2:]]
    victims = [world.site(name, kill=PHASES["shares"]) for name in SITES[:2]]
    for victim in victims:
        ended(victim)
    codes = [ended(party) for party in (serve, *left)]
    said = serve.lines[-1]
    serve = world.serve("--resume")
    again = [ended(party) for party in (*(world.site(name) for name in SITES), serve)]
    found = digest(world.run)
    good = codes == [1, 1, 1] and "2 of 4 clients exchange shares, and secure aggregation needs 3" in said
    return Seen(
        f"exit codes {codes}: {said}; resumed: {again}, adapter {found}",
        good and again == [0] * 5 and found == same[False],
    )


def noised(world: World, same: dict[bool, str]) -> Seen:
    """Each site adds its share of discrete noise inside the ring."""
    world.change(pipeline=[*NOISE, "mask"])
    serve = world.serve("--exact")
    codes = [ended(party) for party in (*(world.site(name) for name in SITES), serve)]
    results = json.loads((world.run / "results.json").read_text())
    (promise,) = results["privacy"]
    found = digest(world.run)
    good = codes == [0] * 5 and promise["epsilon"] > 0 and found != same[False]
    return Seen(f"exit codes {codes}, epsilon {promise['epsilon']:.4g} for {promise['unit']} after 2 rounds", good)


# --- the coordinator's memory


def held(world: World, pipeline: list[Any]) -> dict[str, dict[str, int]]:
    """Run with a pipeline; return for each moment how many pieces of what kind the coordinator's memory has.

    A moment: the first update is counted, all are counted, the sum is opened; last, the log and files after the run.
    """
    world.change(pipeline=pipeline)
    moments = ["counted:", "counted:", "counted:", "counted:", "summed:"]
    serve = world.serve("--exact", stop=moments)
    for name in SITES:
        seen = world.folder / "seen" / name
        seen.mkdir(parents=True, exist_ok=True)
        world.site(name, seen=str(seen))
    assert serve.process
    found = {}
    for i in range(len(moments)):
        wait_stopped(serve)
        if i in (0, 3, 4):
            found[("first counted", "", "", "all counted", "sum opened")[i]] = searched(
                memory_of(serve.process.pid), world
            )
        os.kill(serve.process.pid, signal.SIGCONT)
    codes = [ended(party) for party in world.parties]
    if codes != [0] * 5:
        raise Unseen(f"exit codes {codes}")
    files = [path.read_bytes() for path in world.job.parent.rglob("*") if path.is_file()]
    found["log and files"] = searched([*files, "\n".join(serve.lines).encode()], world)
    return found


def wait_stopped(party: Party) -> None:
    assert party.process
    status = Path(f"/proc/{party.process.pid}/stat")
    until("the coordinator stops", lambda: status.read_text().rpartition(")")[2].split()[0] == "T")


def memory_of(process: int) -> Iterator[bytes]:
    """Yield all memory of a process that can be read, mapping by mapping."""
    maps = Path(f"/proc/{process}/maps").read_text().splitlines()
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        for line in maps:
            place, rights, *rest = line.split()
            if "r" not in rights or rest[-1] in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
                continue
            start, end = (int(text, 16) for text in place.split("-"))
            memory.seek(start)
            try:
                yield memory.read(end - start)
            except OSError:
                continue


def searched(pieces: Any, world: World) -> dict[str, int]:
    """Return how many windows of each kind of vector are found, over all sites, and how many bytes were searched."""
    needles = {
        (kind, name, i): window
        for kind in ("floats", "ring", "masked")
        for name in SITES
        for i, window in enumerate(windows(world.folder / "seen" / name / kind))
    }
    found: set[tuple[str, str, int]] = set()
    size = 0
    for piece in pieces:
        size += len(piece)
        found |= {key for key, window in needles.items() if key not in found and window in piece}
    return {kind: sum(key[0] == kind for key in found) for kind in ("floats", "ring", "masked")} | {"bytes": size}


def windows(path: Path) -> list[bytes]:
    """Return pieces of a vector that nothing else looks like: at places spread over it, without a zero number."""
    if not path.is_file():
        return []
    content, chosen = path.read_bytes(), []
    for part in range(WINDOWS):
        start = part * len(content) // WINDOWS // 4 * 4
        for place in range(start, len(content) - WINDOW, 4):
            window = content[place : place + WINDOW]
            if bytes(4) not in [window[i : i + 4] for i in range(0, WINDOW, 4)] and len(set(window)) > 24:
                chosen.append(window)
                break
    return chosen


def look(world: World) -> list[str]:
    """Return the rows of the table of what the coordinator holds, with a mark where it is not what it should be."""
    runs = {"ring, mask": [*RING, "mask"], "ring, no mask": RING, "no ring": RING[:3]}
    rows, every = [], WINDOWS * len(SITES)
    for name, pipeline in runs.items():
        world.fresh()
        for moment, found in held(world, pipeline).items():
            alone = name == "ring, mask"
            # what must be there shows that the search finds what is there; what must not be there is the claim
            must = {"ring, mask": "masked", "ring, no mask": "ring", "no ring": "floats"}[name]
            there = moment in ("first counted", "all counted")
            good = not alone or found["ring"] == found["floats"] == 0
            good = good and (not there or found[must] >= WINDOWS)
            told = [f"{found[kind]} of {every}" for kind in ("floats", "ring", "masked")]
            cells = [name, moment, f"{found['bytes'] / 1e6:,.1f}", *told, "yes" if good else "**no**"]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
        world.stop()
    return rows


SCENARIOS: dict[str, tuple[Callable[[World, dict[bool, str]], Seen], str]] = {
    "nobody drops out": (everyone, "the plain bits"),
    **{
        f"{LOST} is killed {'after it answered' if after else 'before it answers'} `{phase}`"
        + (", and is back at once" if after else ", and is away past the deadline"): (
            dropped(phase, after),
            "in the sum, the plain bits of all"
            if phase in ("consistency", "unmask") or (phase == "vector" and after)
            else "not in the sum, the plain bits of the other three; back in round 2",
        )
        for phase in PHASES
        for after in (False, True)
    },
    "two of four are killed before `shares`": (too_few, "one sentence; resumed, the plain bits of all"),
    "discrete_noise before mask": (noised, "it ends, with an epsilon"),
}


def prepared(folder: Path, deadline: float) -> World:
    lay_out(folder, SITES)
    world = World(folder, free_port())
    world.change(
        rounds=2,
        pipeline=[*RING, "mask"],
        local={"lr": 0.01, "batch": 4, "steps": 8},
        evaluate={"every": 0, "on": ["loss"]},
        baselines=[],
        failures={"on_client_failure": "drop", "deadline": deadline},
    )
    return world


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        inside(json.loads(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="scenarios whose names hold one of these words; memory")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds of a phase; more on a busy machine")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    root = str(Path(__file__).parent.parent)  # each process runs this module, in a folder of its own
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    world = prepared(given.folder or Path(tempfile.mkdtemp(prefix="weft-secure-sites-")), given.deadline)
    plain = world.job.read_text()
    same = {lost: simulated(world, lost) for lost in (False, True)}
    assert same[False] != same[True], "the lost client changes nothing: this could not show anything"
    rows, memory, failed = dict[str, str](), list[str](), 0
    try:
        for name, (scenario, expected) in SCENARIOS.items():
            if not any(word in name for word in given.only):
                continue
            world.fresh()
            world.job.write_text(plain)
            start = time.monotonic()
            try:
                seen = scenario(world, same)
            except (Unseen, AssertionError) as error:
                seen = Seen(f"NOT SEEN: {error}", False)
            world.stop()
            failed += not seen.good
            rows[name] = f"| {name} | {expected} | {seen.text} | {'yes' if seen.good else '**no**'} |"
            print(
                f"{'ok  ' if seen.good else 'FAIL'} {time.monotonic() - start:6.1f} s  {name}\n       {seen.text}",
                flush=True,
            )
            write(rows, memory, same)
        if any(word in "memory" for word in given.only):
            world.job.write_text(plain)
            memory = look(world)
            failed += sum("**no**" in row for row in memory)
            write(rows, memory, same)
    finally:
        world.stop()
    sys.exit(1 if failed else 0)


def write(rows: dict[str, str], memory: list[str], same: dict[bool, str]) -> None:
    """Write the tables; rows that were not chosen now keep what their last run showed."""
    old = RESULT.read_text(encoding="utf8").splitlines() if RESULT.is_file() else []
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in old if line.startswith("| ")}
    found = {**kept, **rows}
    before = [line for line in old if line.startswith(("| ring,", "| no ring"))]
    every = WINDOWS * len(SITES)
    text = [
        "# Secure aggregation between real processes",
        "",
        f"`python benchmarks/secure_sites.py` on {platform.machine()}, {os.cpu_count()} cores: a coordinator and four "
        "sites as processes, TLS on loopback, two rounds, `--exact`, a deadline "
        "of 20 s or more for each phase. The adapter of a simulation without masks is "
        f"{same[False]}; of one that loses {LOST} in round 1, {same[True]}.",
        "",
        "| what is done in round 1 | expected | seen | as expected |",
        "|---|---|---|---|",
        *(found[name] for name in SCENARIOS if name in found),
        "",
        "## What the coordinator holds",
        "",
        "The coordinator is stopped (SIGSTOP) in round 1 when it has counted the first update, when it has counted "
        f"all, and when the sum is opened; all memory that can be read is searched for {WINDOWS} pieces of {WINDOW} "
        f"bytes of each of the four sites' vectors ({every} pieces of a kind): the clipped update as floats, its "
        "integers in the ring, the masked vector. So are its log and all files of its folder after the run. Pieces "
        "that must be found (masked vectors under a mask, integers without one, floats without a ring) show that the "
        "search finds what is there.",
        "",
        "| pipeline | moment | MB searched | floats | ring | masked | as expected |",
        "|---|---|---:|---:|---:|---:|---|",
        *(memory or before),
    ]
    RESULT.write_text("\n".join([*text, ""]), encoding="utf8")


if __name__ == "__main__":
    main()
