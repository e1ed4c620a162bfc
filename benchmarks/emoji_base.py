"""Emoji pictures and a small CLIP that has seen some groups of them; the other groups are left for clients to teach it.

    python benchmarks/emoji_base.py SOURCE              make the example's pictures and its base again
    python benchmarks/emoji_base.py SOURCE --to FOLDER  the same elsewhere, with the public records and the pretraining

SOURCE holds train.npz, train.jsonl, test.npz and test.jsonl (examples/data/emoji/README.md says where they come from).
The base begins with random weights and is trained in one place on the groups PUBLIC, by Weft itself with `full`.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

import weft
from weft.export import export

Record = dict[str, Any]
EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLIC = ("Objects", "Symbols", "Activities", "Flags")
SIDE = 32  # pixels
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
VOCABULARY = 600
LONGEST = 16  # tokens of a caption
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ROUNDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--to", type=Path)
    given = parser.parse_args()
    if given.to:
        make(given.source, given.to, seed=0)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parts = make(given.source, work, seed=0)
        data, model = EXAMPLES / "data" / "emoji", EXAMPLES / "models" / "emoji-clip"
        for part, rows in (("train", parts["private"]), ("test", parts["test"])):
            write_records(data, part, rows)
            for row in rows:
                (data / "pictures").mkdir(exist_ok=True)
                shutil.copy(work / row["image"], data / "pictures")
        for path in (work / "base").iterdir():
            shutil.copyfile(path, model / path.name)
        halve(model)


def make(source: Path, folder: Path, seed: int) -> dict[str, list[Record]]:
    """Write `pictures/`, `public.jsonl`, `private.jsonl`, `test.jsonl` (private groups) and the trained `base/`."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Record]] = {"public": [], "private": [], "test": []}
    for half in ("train", "test"):
        images = numpy.load(source / f"{half}.npz")["images"]
        for pixels, line in zip(
            images, (source / f"{half}.jsonl").read_text(encoding="utf8").splitlines(), strict=True
        ):
            row = json.loads(line)
            name = f"pictures/{row['codepoints'].replace(' ', '-').lower()}.png"
            write_picture(pixels, folder / name)
            part = "test" if half == "test" else "public" if row["group"] in PUBLIC else "private"
            if part != "test" or row["group"] not in PUBLIC:
                parts[part].append({"image": name} | {key: row[key] for key in ("caption", "group")})
    for part, rows in parts.items():
        write_records(folder, part, rows)
    write_base(folder, parts["public"], seed)
    return parts


def write_records(folder: Path, part: str, rows: Sequence[Record]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{part}.jsonl").write_text(text, encoding="utf8")


def write_picture(pixels: Any, path: Path) -> None:
    """Write a picture in 64 colours of its own, which a file of this size can afford."""
    picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def halve(model: Path) -> None:
    """Store the weights in bfloat16, half as large."""
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def write_base(folder: Path, public: Sequence[Record], seed: int) -> None:
    """Train a CLIP from nothing on the public records, in one place, and write it to `base`."""
    write_untrained(folder / "untrained", [row["caption"] for row in public])
    job = weft.Job(
        model={"name": "untrained", "random": True},
        adapter="full",
        task={"image_text": {"max_length": LONGEST}},
        data={"train": "public.jsonl", "test": "test.jsonl", "split": {"iid": {"clients": 1}}},
        local={"lr": 1e-3, "batch": 64, "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.1, "moments": "keep"},
        rounds=ROUNDS,
        evaluate={"every": 0, "on": ["loss"]},
        baselines=[],
        seed=seed,
        folder=folder,
    )
    run = weft.run(job, folder / "pretraining", overwrite=(folder / "pretraining").exists())
    shutil.rmtree(folder / "base", ignore_errors=True)
    export(run, folder / "base", merge=True)


def write_untrained(folder: Path, captions: Sequence[str]) -> None:
    """Write configuration, tokenizer and image processor, without weights."""
    from transformers import CLIPConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer(captions)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = TOWER | ids | {"vocab_size": len(words), "max_position_embeddings": LONGEST}
    vision = TOWER | {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, architectures=["CLIPModel"])
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size).save_pretrained(folder)


def tokenizer(texts: Sequence[str]) -> Any:
    """Return a tokenizer of pieces of words, learned from texts, that puts CLIP's two tokens around a caption."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator(texts, trainer)
    around = [("<start>", 2), ("<end>", 3)]
    made.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=around)
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LONGEST, **names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
