"""What a power cut may leave of a run folder: every image a file system is allowed to keep comes back whole.

A disk keeps for sure only what was synced: the bytes of a file after its fsync, the names in a folder after the
folder's. All else may be there, may be gone, or, for bytes, be there in part. At every fault point of a few rounds
such images are built from what was synced until then, and each is opened as a resume would open it.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from weft.core.points import listening
from weft.core.types import Server
from weft.files import make_folder
from weft.journal import read
from weft.store import Store

ROUNDS = 4
Names = dict[str, int]


class Disk:
    """The folder as it stands, and what of it was synced. Inodes are held open so that no number is used twice."""

    def __init__(self, root: Path, ignores: Callable[[int], bool] = lambda mode: False) -> None:
        self.root, self.ignores = root, ignores
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, Names] = {root.stat().st_ino: {}}
        self.kept: list[int] = []

    def sync(self, handle: int) -> None:
        """Stand in for os.fsync."""
        if not Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(self.root):
            return
        found = os.fstat(handle)
        self.kept.append(os.dup(handle))
        if self.ignores(found.st_mode):
            return
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(handle)}
        else:
            self.bytes[found.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def close(self) -> None:
        for handle in self.kept:
            os.close(handle)

    def images(self) -> Iterator[dict[str, bytes | None]]:
        """Yield what may be left: path -> bytes, None for a folder."""
        live = {path.stat().st_ino: path for path in [self.root, *self.root.rglob("*")]}
        loose = list(self._unsure(live))
        for part in (0.0, 0.5, 1.0):  # of the bytes that were not synced
            for there in ([], loose, *([name] for name in loose), *([n for n in loose if n != m] for m in loose)):
                yield dict(self._walk(self.root.stat().st_ino, "", live, set(there), part))

    def _unsure(self, live: dict[int, Path]) -> Iterator[tuple[int, str]]:
        """Yield the folder and name of every entry that may be there or not."""
        for number, path in live.items():
            if path.is_dir():
                now, synced = _entries(path), self.names.get(number, {})
                yield from ((number, name) for name in sorted({*now, *synced}) if now.get(name) != synced.get(name))

    def _walk(
        self, folder: int, at: str, live: dict[int, Path], there: set[tuple[int, str]], part: float
    ) -> Iterator[tuple[str, bytes | None]]:
        synced, now = self.names.get(folder, {}), _entries(live[folder]) if folder in live else {}
        for name in sorted({*synced, *now}):
            number = (now if (folder, name) in there else synced).get(name)
            if number is None:
                continue
            path = f"{at}{name}"
            if number in live and live[number].is_dir():
                yield path, None
                yield from self._walk(number, f"{path}/", live, there, part)
                continue
            content = live[number].read_bytes() if number in live else self.bytes.get(number, b"")
            yield path, self.bytes.get(number, b"") if part < 1 and number in self.bytes else _part(content, part)


def _entries(folder: Path) -> Names:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}


def _part(content: bytes, part: float) -> bytes:
    return content[: int(len(content) * part)]


def state(round_: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"adapter": {"w": torch.full((40,), float(round_))}}


def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores: Callable[[int], bool] = lambda mode: False) -> int:
    """Commit a few rounds, open every image of every moment, and return how many of them lost or spoilt a round."""
    home = tmp_path / "disk"
    home.mkdir()
    disk = Disk(home, ignores)
    monkeypatch.setattr("weft.files.os.fsync", disk.sync)
    bad, seen, acknowledged = 0, 0, -1

    def look() -> None:
        nonlocal bad, seen
        for image in disk.images():
            seen += 1
            bad += not sound(image, tmp_path / "image", acknowledged)

    make_folder(home / "run")
    store = Store(home / "run", "job")
    inside = False

    def listen(name: str) -> None:
        nonlocal inside
        if not inside:
            inside = True  # opening an image passes points of its own
            look()
            inside = False

    with listening(listen):
        for number in range(ROUNDS):
            store.commit(Server(state(number), number), {"round": number})
            acknowledged = number
    disk.close()
    assert seen > 300
    return bad


def sound(image: dict[str, bytes | None], folder: Path, acknowledged: int) -> bool:
    """Tell whether a resume finds every round that was committed, as it was, and each once in the journal."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, content in image.items():
        place = folder / path
        place.mkdir() if content is None else place.write_bytes(content)
    try:
        server, _ = Store(folder / "run", "job").latest()
    except Exception:
        return False
    if server is None:
        return acknowledged < 0
    rows = [row["round"] for row in read(folder / "run" / "journal.jsonl")]
    same = bool(torch.equal(server.state["adapter"]["w"], state(server.round)["adapter"]["w"]))
    return server.round >= acknowledged and same and rows == list(range(server.round + 1))


def test_a_power_cut_at_any_moment_loses_no_committed_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert losses(tmp_path, monkeypatch) == 0


@pytest.mark.parametrize("forgotten", [stat.S_ISREG, stat.S_ISDIR])
def test_control_a_sync_that_is_left_out_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: Callable[[int], bool]
) -> None:
    assert losses(tmp_path, monkeypatch, forgotten) > 0
