"""The run folder: the job's copy, checkpoints, the journal; whatever dies, what was committed is whole."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weft import journal
from weft.core import trees
from weft.core.errors import PolicyError, RunError
from weft.core.points import point
from weft.core.round import Record
from weft.core.types import Server, Tensors
from weft.files import make_folder, write_safely

FORMAT = "1"
GENERATIONS = 2
BESIDE = "beside."  # parts of a checkpoint that no algorithm sees


def _digest(flat: Tensors, meta: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in flat.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for one process."""
    make_folder(folder)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PolicyError(f"another process is at work in {folder}; wait for it or choose another --out") from None
        yield


@dataclass(frozen=True)
class Store:
    """Checkpoints and journal of one sequence of rounds.

    A round counts once its checkpoint is renamed into place; the checkpoint carries the round's journal record,
    so a journal that a crash left behind is completed from it.
    """

    folder: Path
    job_hash: str

    @property
    def journal(self) -> Path:
        """Return the path of the journal: one JSON object a line, one line a round."""
        return self.folder / "journal.jsonl"

    def commit(self, server: Server, record: Record) -> None:
        """Make a finished round durable: checkpoint first, then its journal line."""
        flat = trees.flatten({**server.state, **{BESIDE + part: tree for part, tree in server.beside.items()}})
        meta = {
            "format": FORMAT,
            "job": self.job_hash,
            "round": str(server.round),
            "since": json.dumps(server.since, sort_keys=True),
            "record": json.dumps(record, sort_keys=True),
        }
        meta["sha256"] = _digest(flat, meta)
        self._write(server.round, flat, meta)
        point(f"committed:{server.round}")
        journal.append(self.journal, record)

    def _write(self, round_: int, flat: Tensors, meta: dict[str, str]) -> None:
        from safetensors.torch import save

        checkpoints = self.folder / "checkpoints"
        make_folder(checkpoints)
        write_safely(checkpoints / f"{round_:06d}.safetensors", save(flat, metadata=meta))
        for old in sorted(checkpoints.glob("*.safetensors"))[:-GENERATIONS]:
            point(f"forget:{old.name}")
            os.unlink(old)

    def latest(self) -> tuple[Server | None, list[str]]:
        """Return the newest whole checkpoint, and a notice for each damaged one; mend the journal to match it.

        Raise PolicyError for a checkpoint of another job, RunError where all checkpoints are damaged.
        """
        notices: list[str] = []
        files = sorted((self.folder / "checkpoints").glob("*.safetensors"), reverse=True)
        for path in files:
            try:
                server, record = self._read(path)
            except _Damaged as error:
                notices.append(f"{path.name}: {error}; going back to the one before")
                continue
            self._mend(record)
            return server, notices
        if files:
            raise RunError(f"no checkpoint in {self.folder / 'checkpoints'} is whole; start again in another folder")
        self.journal.unlink(missing_ok=True)
        return None, notices

    def _read(self, path: Path) -> tuple[Server, Record]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                flat = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, OSError, ValueError) as error:
            raise _Damaged(str(error)) from None
        seal = meta.pop("sha256", "")
        if _digest(flat, meta) != seal:
            raise _Damaged("its checksum does not match")
        if meta["format"] != FORMAT:
            raise PolicyError(f"{path} was written by another version of Weft (format {meta['format']}, not {FORMAT})")
        if meta["job"] != self.job_hash:
            raise PolicyError(f"{path} belongs to another job; resume with the job that began this run")
        parts = trees.unflatten(flat)
        beside = {part.removeprefix(BESIDE): parts.pop(part) for part in list(parts) if part.startswith(BESIDE)}
        server = Server(parts, int(meta["round"]), json.loads(meta["since"]), beside)
        return server, json.loads(meta["record"])

    def _mend(self, record: Record) -> None:
        """Let the journal end with the checkpoint's own record, whole lines only, each round once."""
        lines = [line for line in journal.read(self.journal) if line["round"] < record["round"]]
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in [*lines, record])
        write_safely(self.journal, text.encode())


class _Damaged(Exception):
    """A checkpoint that is torn or altered."""
