"""Jobs with pictures: tiny models in folders, and pictures whose colour is what is to be learned."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from weft.testing.families import config_of
from weft.testing.tiny import SIDE, tokenizer

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220), "yellow": (240, 220, 40)}
SQUARE = {"height": SIDE, "width": SIDE}


@cache
def model_folder(family: str) -> Path:
    """Return a folder with a tiny ViT or CLIP of random weights, its image processor and its tokenizer."""
    import transformers

    folder = Path(mkdtemp()) / family
    made = {"vit": transformers.ViTModel, "clip": transformers.CLIPModel}[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made(config_of(family)).save_pretrained(folder)
    if family == "clip":
        CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE).save_pretrained(folder)
        tokenizer(captions=True).save_pretrained(folder)
    else:
        ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return folder


def write_records(folder: Path, name: str, count: int, offset: int = 0) -> None:
    """Write pictures of four colours and three sites, each a little brighter than the last of its colour."""
    rows = []
    for i in range(offset, offset + count):
        colour = list(COLOURS)[i % 4]
        Image.new("RGB", (10 + i % 3, 12), tuple(min(255, c + i) for c in COLOURS[colour])).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": colour, "caption": f"{colour} {i}", "site": f"site-{i % 3}"})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def job_values(folder: Path, family: str) -> dict[str, Any]:
    """Return the values of a small job on pictures, ready to change."""
    write_records(folder, "train.jsonl", 22)
    write_records(folder, "test.jsonl", 8, 24)
    return {
        "model": {"name": str(model_folder(family))},
        "adapter": {"lora": {"rank": 2, "alpha": 6}},
        "task": "image_classification" if family == "vit" else {"image_text": {"max_length": 20}},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "split": {"by": "site"}},
        "local": {"lr": 0.02, "batch": 3},
        "rounds": 2,
        "baselines": ["untrained"],
        "seed": 3,
        "folder": folder,
    }
