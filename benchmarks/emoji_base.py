"""Make a small CLIP for the emoji pictures: from a configuration, trained in one place on the public part of them.

    python benchmarks/emoji_base.py SOURCE TARGET [--seed 0] [--side 32]

SOURCE holds train.npz, train.jsonl, test.npz and test.jsonl (examples/data/emoji/README.md says where they come from).
TARGET gets `pictures/`, `public.jsonl`, `private.jsonl`, `test.jsonl` and `base/`, the trained model. A hash of each
emoji's code points decides which half of the training pictures is public.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import weft
from weft.core.keys import number
from weft.export import export

Record = dict[str, Any]
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
VOCABULARY = 600
LONGEST = 16  # tokens of a caption
TOWER = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    records = write_records(given.source, given.target, given.side)
    write_base(given.target, records["public"], given.side, seed=given.seed, rounds=given.rounds)


def write_records(source: Path, target: Path, side: int) -> dict[str, list[Record]]:
    """Write the pictures and the three files of records that name them; return the records."""
    (target / "pictures").mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Record]] = {"public": [], "private": [], "test": []}
    for half in ("train", "test"):
        images = numpy.load(source / f"{half}.npz")["images"]
        for place, line in enumerate((source / f"{half}.jsonl").read_text(encoding="utf8").splitlines()):
            row = json.loads(line)
            name = f"pictures/{row['codepoints'].replace(' ', '-').lower()}.png"
            write_picture(images[place], target / name, side)
            record = {"image": name} | {key: row[key] for key in ("caption", "group", "subgroup")}
            parts[half if half == "test" else part_of(row)].append(record)
    for part, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{part}.jsonl").write_text(text, encoding="utf8")
    return parts


def part_of(row: Record) -> str:
    return ("public", "private")[number(0, "emoji", row["codepoints"]) % 2]


def write_picture(pixels: Any, path: Path, side: int) -> None:
    """Write a picture in 64 colours of its own, which is a quarter of its size in all of them."""
    picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
    picture.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def write_base(folder: Path, public: Sequence[Record], side: int, *, seed: int, rounds: int) -> None:
    """Train a CLIP from nothing on the public records, in one place, and write it to `base`."""
    shutil.rmtree(folder / "base", ignore_errors=True)
    write_untrained(folder / "untrained", public, side)
    job = weft.Job(
        model={"name": "untrained", "random": True},
        adapter="full",
        task={"image_text": {"max_length": LONGEST}},
        data={"train": "public.jsonl", "test": "test.jsonl", "split": {"iid": {"clients": 1}}},
        local={"lr": 1e-3, "batch": 64, "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.1, "moments": "keep"},
        rounds=rounds,
        evaluate={"every": 5},
        seed=seed,
        folder=folder,
    )
    run = weft.run(job, folder / "pretraining", overwrite=True)
    print([(row["round"], round(row["test_loss"], 3)) for row in run.history if "test_loss" in row])
    print(json.dumps(run.results["methods"]["federated"]["overall"]))
    export(run, folder / "base", merge=True)


def write_untrained(folder: Path, public: Sequence[Record], side: int) -> None:
    """Write configuration, tokenizer and image processor, without weights."""
    words = tokenizer([row["caption"] for row in public])
    text = TOWER | {
        "vocab_size": len(words), "max_position_embeddings": LONGEST, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3,
    }  # fmt: skip
    vision = TOWER | {"image_size": side, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"height": side, "width": side}
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size).save_pretrained(folder)


def tokenizer(texts: Sequence[str]) -> Any:
    """Return a tokenizer of pieces of words, learned from texts, that puts CLIP's two tokens around a caption."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LONGEST, **names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
