"""Checkpoints and journal: whole after any crash, damaged files found, nothing counted twice."""

import json
from pathlib import Path

import pytest
import torch

from weft.core.errors import PolicyError, RunError
from weft.core.types import Server
from weft.journal import read as read_journal
from weft.store import Store, locked


def server(round_: int) -> Server:
    state = {"adapter": {"b": torch.full((2, 3), float(round_)), "a": torch.arange(4.0)}}
    return Server(state, round_, {"x": round_})


def filled(folder: Path, rounds: int = 3) -> Store:
    store = Store(folder, "hash")
    for number in range(rounds + 1):
        store.commit(server(number), {"round": number, "note": f"n{number}"})
    return store


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("*.safetensors"))[-1]


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    got, notices = filled(tmp_path).latest()
    assert got is not None
    assert not notices
    assert (got.round, got.since) == (3, {"x": 3})
    assert list(got.state["adapter"]) == ["a", "b"]
    assert torch.equal(got.state["adapter"]["b"], torch.full((2, 3), 3.0))
    assert [path.stem for path in sorted((tmp_path / "checkpoints").iterdir())] == ["000002", "000003"]


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert Store(tmp_path, "hash").latest() == (None, [])


@pytest.mark.parametrize("damage", ["truncated", "zeros", "flipped", "empty", "renamed"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    store, path = filled(tmp_path), newest(tmp_path)
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    other = path.with_name("000002.safetensors").read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-5],
            "zeros": bytes(len(content)),
            "flipped": flipped,
            "empty": b"",
            "renamed": content.replace(b'"round":"3"', b'"round":"4"') if b'"round":"3"' in content else other[:-1],
        }[damage]
    )
    got, notices = store.latest()
    assert got is not None
    assert got.round == 2
    assert len(notices) == 1
    assert notices[0].startswith("000003.safetensors: ")
    assert [row["round"] for row in read_journal(store.journal)] == [0, 1, 2]


def test_every_single_flipped_bit_of_the_payload_is_found(tmp_path: Path) -> None:
    store, path = filled(tmp_path), newest(tmp_path)
    content = path.read_bytes()
    for place in range(8, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        got, _ = store.latest()
        assert got is not None
        assert got.round == 2 or torch.equal(got.state["adapter"]["b"], torch.full((2, 3), 3.0))


def test_nothing_whole_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"rubbish")
    with pytest.raises(RunError, match=r"no checkpoint .* is whole"):
        store.latest()


def test_another_job_or_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    with pytest.raises(PolicyError, match="belongs to another job"):
        Store(tmp_path, "other").latest()
    monkeypatch.setattr("weft.store.FORMAT", "2")
    with pytest.raises(PolicyError, match="another version of Weft"):
        Store(tmp_path, "hash").latest()


@pytest.mark.parametrize("tail", [b"", b'{"round": 3, "no', b'{"round": 3}\n{"round": 4}\n'])
def test_the_journal_is_mended_from_the_checkpoint(tmp_path: Path, tail: bytes) -> None:
    """Killed between checkpoint and journal line, in the middle of the line, or with lines from beyond."""
    store = filled(tmp_path)
    lines = store.journal.read_bytes().splitlines(keepends=True)
    store.journal.write_bytes(b"".join(lines[:3]) + tail)
    store.latest()
    rows = read_journal(store.journal)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["note"] == "n3"
    assert store.journal.read_bytes().endswith(b"\n")
    assert all(json.loads(line) for line in store.journal.read_bytes().splitlines())


def test_two_processes_cannot_hold_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(PolicyError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
