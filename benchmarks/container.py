"""The image of docs/deploy/Containerfile: built, then a coordinator and three sites run with it, over TLS.

    python -m benchmarks.container [--base IMAGE --note TEXT] [--build="OPTION ..."] [--run="OPTION ..."]

Needs podman, as root or not. `--base` takes another image in place of the Containerfile's, and `--note` says what it
is; `--build` and `--run` pass options on to podman. It ends by itself, and writes benchmarks/results/container.md.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import yaml

from benchmarks.failures import until
from weft.deploy.demo import free_port
from weft.job import load

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/container.md"
IMAGE, UID = "localhost/weft-benchmark", 10001
SITES = ["hospital-a", "hospital-b", "hospital-c"]
JOB = {
    "model": {"name": "models/stories260K"},
    "adapter": {"lora": {"rank": 8, "alpha": 16}},
    "task": {"causal_lm": {"template": "plain", "max_length": 112}},
    "data": {},
    "local": {"lr": 5.0e-3, "batch": 4, "epochs": 4},
    "rounds": 3,
    "evaluate": {"on": ["loss"]},
    "failures": {"on_client_failure": "retry", "deadline": 600},
    "seed": 7,
}


@dataclass
class World:
    """A folder for each party, mounted at /site of its containers."""

    folder: Path
    options: list[str]
    port: int = field(default_factory=free_port)

    def start(self, party: str, *command: str, keep: str = "w") -> subprocess.Popen[str]:
        """Run weft in a container of a party; what it says is in the party's log."""
        mounts = ["-v", f"{self.folder / party}:/site:Z", "-v", f"{ROOT / 'examples/models'}:/models:ro,z"]
        words = ["podman", "run", "--rm", "--init", "--network=host", "--name", f"weft-benchmark-{party}"]
        with open(self.folder / f"{party}.log", keep) as log:
            every = [*words, *self.options, *mounts, IMAGE, *command]
            return subprocess.Popen(every, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True)

    def said(self, party: str) -> list[str]:
        return (self.folder / f"{party}.log").read_text(errors="replace").splitlines()

    def join(self, site: str) -> subprocess.Popen[str]:
        files = ["--data", "train.jsonl", "--test", "test.jsonl", "--model", "/models/stories260K", "--accept"]
        accept = load(self.folder / "coordinator/job.yaml").hash()
        return self.start(site, "join", f"localhost:{self.port}", "--as", site, *files, accept, keep="a")

    def laid_out(self) -> "World":
        """Make the folders, the sites' keys in containers of theirs, records, and the job."""
        for party in ("coordinator", "closed", *SITES):
            (self.folder / party).mkdir()
            if os.geteuid() == 0:
                os.chown(self.folder / party, UID, UID)
        (self.folder / "closed").chmod(0o555)
        keys = {}
        for place, site in enumerate(SITES):
            assert self.start(site, "keys", "new", site).wait() == 0, self.said(site)
            keys |= yaml.safe_load(self.said(site)[-1])
            for name, step in (("train", 2), ("test", 3)):  # 60 and 20 records, of three institutes each
                lines = (ROOT / f"examples/data/medquad/{name}.jsonl").read_text().splitlines(keepends=True)
                own = lines[place * len(lines) // 3 : (place + 1) * len(lines) // 3 : step]
                (self.folder / site / f"{name}.jsonl").write_text("".join(own))
        (self.folder / "coordinator/job.yaml").write_text(yaml.safe_dump({**JOB, "sites": keys}, sort_keys=False))
        return self

    def run(self, stopped: str = "") -> str:
        """Run the job; stop a party in round 2 and start it again; return how it ended, all exit codes, the adapters."""
        for site in SITES:
            shutil.rmtree(self.folder / site / f"weft-{site}", ignore_errors=True)
            (self.folder / f"{site}.log").write_text("")
        serve, ended = ["serve", "job.yaml", "--listen", f"127.0.0.1:{self.port}", "--exact"], ""
        parties = {"coordinator": self.start("coordinator", *serve, "--overwrite")}
        until("the coordinator listens", lambda: any("listening" in line for line in self.said("coordinator")))
        for site in SITES:
            shutil.copy(self.folder / "coordinator/weft-certs/ca.pem", self.folder / site)
            parties[site] = self.join(site)
        if stopped:
            until("round 2", lambda: any("round 2: training" in line for line in self.said(SITES[0])), 300)
            subprocess.run(["podman", "stop", "--time", "30", f"weft-benchmark-{stopped}"], check=True)
            ended = f"exit {parties[stopped].wait()}: {self.said(stopped)[-1]}; then "
            coordinator = stopped == "coordinator"
            parties[stopped] = self.start(stopped, *serve, "--resume") if coordinator else self.join(stopped)
        codes = [party.wait(600) for party in parties.values()]
        folders = [self.folder / "coordinator/runs/job", *(self.folder / site / f"weft-{site}" for site in SITES)]
        files = [folder / "adapter/adapter_model.safetensors" for folder in folders]
        hashes = {sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "none" for path in files}
        return f"{ended}{codes}, adapter {', '.join(sorted(hashes))} at all four"


def podman(*words: str) -> str:
    return subprocess.run(["podman", *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def shown(world: World) -> list[tuple[str, str, str, bool]]:
    """Return rows: what is done, what is expected, what was seen, whether it is as expected."""
    rows = []
    for what, party, command, expected in (
        ("`weft --help`", "coordinator", "--help", "0: Usage: weft [OPTIONS] COMMAND [ARGS]..."),
        ("`weft keys new` in a folder that it cannot write", "closed", "keys new x", "2: error: x.key cannot be writ"),
        ("`weft demo` in it", "closed", "demo", "2: error: weft-demo: Permission denied"),
    ):
        code = world.start(party, *command.split()).wait()
        said = " / ".join([line.strip() for line in world.said(party) if line.strip()][: None if code else 1])
        rows.append(
            (what, "one sentence" if code else "the help", f"{code}: {said}", f"{code}: {said}".startswith(expected))
        )
    plain = world.run()
    alike = plain.startswith("[0, 0, 0, 0], adapter ") and "none" not in plain and plain.count(",") == 4
    rows.append(("a coordinator and three sites", "all end with 0, one adapter", plain, alike))
    for who in ("hospital-b", "coordinator"):
        seen = world.run(stopped=who)
        good = seen.startswith("exit 143: error: stopped; ") and seen.endswith(f"then {plain}")
        rows.append((f"`podman stop` of {who} in round 2, started again", "one sentence; the same bytes", seen, good))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="an image in place of the Containerfile's own")
    parser.add_argument("--note", default="", help="what that image is")
    parser.add_argument("--build", default="", help="options for podman build")
    parser.add_argument("--run", default="", help="options for podman run")
    given = parser.parse_args()
    start, base = time.monotonic(), ["--from", given.base] if given.base else []
    podman("build", "-f", f"{ROOT}/docs/deploy/Containerfile", "-t", IMAGE, *base, *shlex.split(given.build), str(ROOT))
    built = time.monotonic() - start
    size = int(podman("image", "inspect", "--format", "{{.Size}}", IMAGE)) / 1e9
    keep = [f"--userns=keep-id:uid={UID},gid={UID}"] if os.geteuid() else []
    rows = shown(World(Path(tempfile.mkdtemp(prefix="weft-container-")), [*keep, *shlex.split(given.run)]).laid_out())
    own = f"**not** the Containerfile's own, but a stand-in for it: {given.note or given.base}" if base else "its own"
    text = [
        "# The image, built and run",
        "",
        f"`python -m benchmarks.container` on {platform.machine()}, {os.cpu_count()} cores, podman "
        f"{podman('version', '--format', '{{.Client.Version}}')} {'without' if os.geteuid() else 'as'} root: "
        "a coordinator and three sites as containers, TLS on loopback, 60 records each, `--exact`.",
        "",
        f"The base image was {own}. Built in {built:.0f} s; {size:.1f} GB.",
        "",
        "| what is done | expected | seen | as expected |",
        "|---|---|---|---|",
        *(f"| {what} | {expected} | {seen} | {'yes' if good else '**no**'} |" for what, expected, seen, good in rows),
    ]
    print("\n".join(text))
    RESULT.write_text("\n".join([*text, ""]), encoding="utf8")
    raise SystemExit(0 if all(good for *_, good in rows) else 1)


if __name__ == "__main__":
    main()
