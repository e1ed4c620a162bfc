"""A job, its records at some sites, and all ends of it as threads of this process, over TLS on loopback."""

import hashlib
import json
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from weft import Job, identity
from weft.core.errors import WeftError
from weft.deploy.certificates import Certificates
from weft.deploy.join import Member, join
from weft.deploy.own import Own
from weft.deploy.policy import Policy
from weft.deploy.serve import Place, serve
from weft.watch import Watch

KEYS = {f"site-{i}": identity.new() for i in range(3)}


def take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sites work one after the other: as processes they have torch's global state each to itself."""
    answer, turn = Member.answer, threading.Lock()

    def in_turn(member: Member, content: bytes) -> tuple[bytes, bool]:
        with turn:
            return answer(member, content)

    monkeypatch.setattr(Member, "answer", in_turn)


class Notes(Watch):
    """Keeps what a coordinator says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        """Keep a notice."""
        self.said.append(text)


class World:
    """A job, its records at three sites, and their ends."""

    def __init__(
        self,
        values: dict[str, Any],
        folder: Path,
        tls: Certificates,
        keys: Mapping[str, identity.Identity] = KEYS,
    ) -> None:
        self.folder, self.tls, self.keys = folder, tls, keys
        self.values = values | {"sites": {name: {"key": key.public} for name, key in keys.items()}}
        for part in ("train", "test"):
            rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
            for name in keys:
                own = [json.dumps(row) + "\n" for row in rows if row["site"] == name]
                (folder / f"{name}-{part}.jsonl").write_text("".join(own))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.notes, self.errors, self.said = Notes(), dict[str, WeftError](), dict[str, list[str]]()
        self.threads: list[threading.Thread] = []

    @property
    def job(self) -> Job:
        return Job(**self.values)

    def serve(self, **options: Any) -> Path:
        place = Place(("127.0.0.1", self.port), self.tls, absent=240)
        try:
            return serve(self.job, self.folder / "sites", place, self.notes, **options).folder
        except WeftError as error:
            error.add_note(f"what sites ended with: {self.errors}; what they said: {self.said}")
            raise

    def join(self, name: str, **changes: Any) -> None:
        paths = [self.folder / f"{name}-{part}.jsonl" for part in ("train", "test")]
        given = {"identity": self.keys[name], "accept": self.job.hash(), "policy": Policy(patience=10)} | changes
        model = str(self.values["model"]["name"])
        own = Own(name, *paths, given.pop("model", model), folder=self.folder / f"at-{name}", **given)
        said = self.said.setdefault(name, [])

        def run() -> None:
            try:
                join(f"127.0.0.1:{self.port}", own, self.tls.ca, lambda summary: False, said.append)
            except WeftError as error:
                self.errors[name] = error

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def end(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def adapter(folder: Path) -> str:
    """Return a digest of the adapter that a run folder, or a site's folder, holds."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
