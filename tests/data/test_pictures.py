"""Pictures beside a data file: what is read, what is refused before it is decoded, and that no name is told."""

import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from weft.core.errors import JobError
from weft.data import pictures
from weft.data.records import Table, read

NEEDS = (("image", "label"),)
RED = (200, 10, 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one good picture in it, and one outside."""
    here = tmp_path / "data"
    (here / "in").mkdir(parents=True)
    Image.new("RGB", (6, 4), RED).save(here / "in" / "pemberton.png")
    Image.new("RGB", (6, 4), RED).save(tmp_path / "outside.png")
    return here


def table(folder: Path, *names: Any, **keys: Any) -> Table:
    rows = [json.dumps({"image": name, "label": "a"}) + "\n" for name in names]
    (folder / "x.jsonl").write_text("".join(rows))
    return read("x.jsonl", folder=folder, needs=NEEDS, **keys)


def refusal(folder: Path, *names: Any) -> str:
    with pytest.raises(JobError) as caught:
        table(folder, *names)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "pemberton" not in sentence
    return sentence


def test_a_path_becomes_whole(folder: Path) -> None:
    (record,) = table(folder, "in/../in/pemberton.png").records
    assert record["image"] == str((folder / "in" / "pemberton.png").resolve())
    assert pictures.decoded(Path(record["image"])).getpixel((0, 0)) == RED


@pytest.mark.parametrize("name", ["../outside.png", "in/../../outside.png", "{whole}", "link.png", "away/outside.png"])
def test_nothing_outside_the_folder_is_read(folder: Path, name: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "away").symlink_to(folder.parent)
    name = name.replace("{whole}", str(folder / "in" / "pemberton.png"))
    said = refusal(folder, "in/pemberton.png", name)
    assert said == (
        "x.jsonl:2: the column 'image' leads out of the data file's folder. "
        "Correct it, or set data.on_bad_record: skip."
    )


def test_what_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    (folder / "round.png").symlink_to(folder / "round.png")
    for name in ("pemberton-2.png", "in", "pipe.png", "round.png", "x" * 400):
        assert "x.jsonl:1: the column 'image' names no file beside the data file" in refusal(folder, name)
    assert "the column 'image' is not text but a number" in refusal(folder, 7)
    assert "the column 'image' is empty" in refusal(folder, " ")


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a size that it does not hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_damaged_files(folder: Path) -> None:
    whole = (folder / "in" / "pemberton.png").read_bytes()
    for content in (whole[:-30], whole[:40], whole[:50] + b"\x00" + whole[51:], bomb(8, 8)):
        (folder / "pemberton.png").write_bytes(content)
        assert "x.jsonl:2: the picture is damaged" in refusal(folder, "in/pemberton.png", "pemberton.png")
    for content in (b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        (folder / "pemberton.png").write_bytes(content)
        assert "damaged or none of PNG, JPEG, WEBP, BMP" in refusal(folder, "pemberton.png")


def test_size_is_known_before_a_pixel_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import PngImagePlugin

    for side, name in ((8_000, "a.png"), (60_000, "b.png")):
        (folder / name).write_bytes(bomb(side, side))

    def never(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", never)
    assert "the picture has more than 50,000,000 pixels" in refusal(folder, "a.png")
    assert "the picture has more than 50,000,000 pixels" in refusal(folder, "b.png")
    with pytest.raises(JobError, match="the picture is damaged"):  # the control: of a good size it is decoded
        pictures.decoded(folder / "in" / "pemberton.png")
    monkeypatch.setattr(pictures, "MOST_BYTES", 10)
    assert "the picture's file has more than 10 bytes" in refusal(folder, "in/pemberton.png")


def test_deep_pictures_are_not_cut_to_white(folder: Path) -> None:
    """16 bits a channel, as scanners write: Pillow's RGB would be white nearly everywhere."""
    Image.new("I;16", (4, 4), 30_000).save(folder / "deep.png")
    assert "more than 8 bits a channel" in refusal(folder, "deep.png")


def test_transparent_is_white_and_upright_is_upright(folder: Path) -> None:
    Image.new("RGBA", (2, 2), (*RED, 0)).save(folder / "clear.png")
    assert pictures.decoded(folder / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    picture = Image.new("RGB", (4, 2), RED)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(folder / "turned.jpg", exif=exif)
    assert pictures.decoded(folder / "turned.jpg").size == (2, 4)


def test_bad_pictures_may_be_left_out(folder: Path) -> None:
    found = table(folder, "in/pemberton.png", "../outside.png", on_bad_record="skip", bad_record_cap=0.5)
    assert len(found.records) == found.skipped == 1
    assert found.bad == ("line 2: the column 'image' leads out of the data file's folder",)


def test_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(JobError, match=r"pictures need Pillow; install it: pip install 'weft-fl\[images\]'"):
        table(folder, "in/pemberton.png")


def test_a_dataset_of_the_hub_has_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.data import formats

    monkeypatch.setattr(formats, "_open_dataset", lambda source, *named: formats.Opened(
        source, iter([(1, {"image": "a.png", "label": "a"})]), "0", "record"))  # fmt: skip
    with pytest.raises(JobError, match="pictures are read from files beside a data file"):
        read("org/name", folder=folder, needs=NEEDS)
