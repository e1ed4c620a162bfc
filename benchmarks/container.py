"""The image of docs/deploy/Containerfile: built, then a coordinator and three sites run with it, as docs/sites.md says.

    python benchmarks/container.py [--base IMAGE --note TEXT] [--build="OPTION ..."] [--run="OPTION ..."]

Needs podman, as root or not. `--base` takes another image in place of the Containerfile's, and `--note` says what it
is; `--build` and `--run` pass options on to podman. It ends by itself, and writes benchmarks/results/container.md.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from failures import until

from weft.deploy.demo import free_port
from weft.job import load

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/container.md"
IMAGE, UID = "localhost/weft-benchmark", 10001
SITES = ["hospital-a", "hospital-b", "hospital-c"]
Row = tuple[str, str, str, bool]  # what is done, what is expected, what was seen, whether it is as expected


@dataclass
class World:
    """A folder for each party, mounted at /site of its containers, and one more that no container can write."""

    folder: Path
    options: list[str]
    port: int = field(default_factory=free_port)

    def start(self, party: str, *command: str) -> subprocess.Popen[bytes]:
        """Run weft in a container of a party; all that it says is in the party's log."""
        mounts = ["-v", f"{self.folder / party}:/site:Z", "-v", f"{ROOT / 'examples/models'}:/models:ro,z"]
        words = ["podman", "run", "--rm", "--init", "--network=host", "--name", f"weft-benchmark-{party}"]
        with open(self.folder / f"{party}.log", "ab") as log:
            return subprocess.Popen([*words, *self.options, *mounts, IMAGE, *command], stdout=log, stderr=log)

    def said(self, party: str) -> list[str]:
        return [line for line in (self.folder / f"{party}.log").read_text().splitlines() if line.strip()]

    def join(self, site: str) -> subprocess.Popen[bytes]:
        files = ["--data", "train.jsonl", "--test", "test.jsonl", "--model", "/models/stories260K", "--accept"]
        accept = load(self.folder / "coordinator/job.yaml").hash()
        return self.start(site, "join", f"localhost:{self.port}", "--as", site, *files, accept)

    def laid_out(self) -> "World":
        """Make the folders, each site's key in a container of its own, its records, and the job of docs/sites.md."""
        found = re.search(r"```yaml job.yaml\n(.*?)```", (ROOT / "docs/sites.md").read_text(), re.DOTALL)
        assert found
        job = found[1]
        for party in ("coordinator", "closed", *SITES):
            (self.folder / party).mkdir()
            if os.geteuid() == 0:
                os.chown(self.folder / party, UID, UID)
        (self.folder / "closed").chmod(0o555)
        for place, site in enumerate(SITES):
            assert self.start(site, "keys", "new", site).wait() == 0, self.said(site)
            job = re.sub(rf"{site}: .*", self.said(site)[-1].strip(), job)
            for name, step in (("train", 2), ("test", 3)):  # 60 and 20 records, of three institutes each
                lines = (ROOT / f"examples/data/medquad/{name}.jsonl").read_text().splitlines(keepends=True)
                own = lines[place * len(lines) // 3 : (place + 1) * len(lines) // 3 : step]
                (self.folder / site / f"{name}.jsonl").write_text("".join(own))
        (self.folder / "coordinator/job.yaml").write_text(job)
        return self

    def run(self, stopped: str = "") -> str:
        """Run the job; stop a party in round 2, start it again; return how it ended, all exit codes, the adapters."""
        for party in ("coordinator", *SITES):
            shutil.rmtree(self.folder / party / f"weft-{party}", ignore_errors=True)
            (self.folder / f"{party}.log").write_text("")
        serve, ended = ["serve", "job.yaml", "--listen", f"127.0.0.1:{self.port}", "--exact"], ""
        parties = {"coordinator": self.start("coordinator", *serve, "--overwrite")}
        until("the coordinator listens", lambda: any("listening" in line for line in self.said("coordinator")))
        for site in SITES:
            shutil.copy(self.folder / "coordinator/weft-certs/ca.pem", self.folder / site)
            parties[site] = self.join(site)
        if stopped:
            until("round 2", lambda: any("round 2: training" in line for line in self.said(SITES[0])), 300)
            podman("stop", "--time", "60", f"weft-benchmark-{stopped}")
            ended = f"exit {parties[stopped].wait()}: {self.said(stopped)[-1]}; then "
            again = self.join(stopped) if stopped in SITES else self.start(stopped, *serve, "--resume")
            parties[stopped] = again
        codes = [party.wait(600) for party in parties.values()]
        folders = [self.folder / "coordinator/runs/job", *(self.folder / site / f"weft-{site}" for site in SITES)]
        files = [folder / "adapter/adapter_model.safetensors" for folder in folders]
        hashes = [sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "none" for path in files]
        return f"{ended}exit codes {codes}, adapters {', '.join(hashes)}"


def podman(*words: str) -> str:
    return subprocess.run(["podman", *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def rows(world: World) -> list[Row]:
    code = world.start("coordinator", "--help").wait()
    seen = f"exit {code}: {world.said('coordinator')[0]}"
    found = [("`weft --help`", "the help", seen, seen.startswith("exit 0: Usage: weft"))]
    code = world.start("closed", "keys", "new", "hospital-d").wait()
    seen = f"exit {code}: {' '.join(world.said('closed'))}"
    good = seen.startswith("exit 2: error: hospital-d.key cannot be written: Permission denied")
    found.append(("`weft keys new` where the container cannot write its folder", "one sentence", seen, good))
    plain = world.run()
    good = (
        plain.startswith("exit codes [0, 0, 0, 0]")
        and "none" not in plain
        and len({text.strip(",") for text in plain.split()[-4:]}) == 1
    )
    found.append(("a coordinator and three sites", "all end with 0 and with one adapter", plain, good))
    for who in ("hospital-b", "coordinator"):
        seen = world.run(stopped=who)
        good = seen.startswith("exit 143: error: stopped; ") and seen.endswith(f"then {plain}")
        found.append((f"`podman stop` of {who} in round 2, started again", "one sentence; the same bytes", seen, good))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("base", "note", "build", "run"):
        parser.add_argument(f"--{name}", default="")
    given = parser.parse_args()
    base = ["--from", given.base] if given.base else []
    start, file = time.monotonic(), f"{ROOT}/docs/deploy/Containerfile"
    podman("build", "--no-cache", "-f", file, "-t", IMAGE, *base, *shlex.split(given.build), str(ROOT))
    own = f"**not** the Containerfile's, but a stand-in for it: {given.note}" if base else "the Containerfile's own"
    size = int(podman("image", "inspect", "--format", "{{.Size}}", IMAGE)) / 1e9
    built = f"The base image was {own}. Built in {time.monotonic() - start:.0f} s; {size:.1f} GB, the base included."
    keep = [f"--userns=keep-id:uid={UID},gid={UID}"] if os.geteuid() else []
    world = World(Path(tempfile.mkdtemp(prefix="weft-container-")), [*keep, *shlex.split(given.run)])
    found = rows(world.laid_out())
    text = [
        "# The image, built and run",
        "",
        f"`python benchmarks/container.py` on {platform.machine()}, {os.cpu_count()} cores, "
        f"{podman('--version')}, {'without' if os.geteuid() else 'as'} root: the job of docs/sites.md, four containers "
        "with `--init`, TLS on loopback, 60 training records a site, `--exact`.",
        "",
        built,
        "",
        "| what is done | expected | seen | as expected |",
        "|---|---|---|---|",
        *(f"| {what} | {expected} | {seen} | {'yes' if good else '**no**'} |" for what, expected, seen, good in found),
    ]
    RESULT.write_text("\n".join([*text, ""]), encoding="utf8")
    print("\n".join(text))
    raise SystemExit(0 if all(good for *_, good in found) else 1)


if __name__ == "__main__":
    main()
