"""Classification of short texts: packed blocks against padded ones, and against a padded loop over the clients.

    python benchmarks/engine_classes.py

An encoder of MiniLM's shape (22 M, random weights) and a LLaMA of 25 M with a head of 20 classes, LoRA r=8 on the
queries and values; the texts are questions of Banking77 in words of a byte-pair vocabulary learned from them, 8 a
client and step. One thread and its CPU time, variants in turn, medians after a warm-up.

- loop: plain peft and torch.optim, one client after another, each batch padded to its own longest row
- padded, packed: the blocks that Weft makes in that mode, as many clients as fill a step
- one by one: packed, one client after another

Writes benchmarks/results/engine_classes.md.
"""

import argparse
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from engine import auto, blocks, measure, padded, plain

from weft.adapters.lora import lora
from weft.core.task import Example
from weft.site.cohort import Mode
from weft.site.model import Loaded, ready
from weft.tasks.classification import classification

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "benchmarks/results/engine_classes.md"
CLASSES, WORDS, BATCH, STEPS = 20, 4000, 8, 4
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "BERT 22M": (
        {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 1536, "vocab_size": WORDS},
        ["query", "value"],
    ),
    "LLaMA 25M": (
        {"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
         "intermediate_size": 1376, "vocab_size": WORDS, "num_key_value_heads": 8},
        ["q_proj", "v_proj"],
    ),
}  # fmt: skip


def loaded(shape: str) -> Loaded:
    """Return a random model with a head and an adapter."""
    values, targets = SHAPES[shape]
    torch.manual_seed(0)
    own = {key: value for key, value in values.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(values["model_type"], **own, num_labels=CLASSES, pad_token_id=0)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, 0.0)
    net = transformers.AutoModelForSequenceClassification.from_config(config).requires_grad_(False)
    adapted: Any = lora(rank=8, targets=targets).attach(net, "SEQ_CLS", 0)
    return ready(adapted, type("Pad", (), {"pad_token_id": 0})(), torch.device("cpu"))


def texts(path: Path) -> list[Example]:
    """Return questions with their intents, as numbers, in an order of chance."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=WORDS, show_progress=False)
    words.train_from_iterator([row["text"] for row in rows], trainer)
    names = sorted({row["label"] for row in rows})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    chosen = [row for i in order if (row := rows[i])["label"] in names[:CLASSES]]
    return [{"ids": torch.tensor(words.encode(row["text"]).ids), "label": names.index(row["label"])} for row in chosen]


def labelled(rows: list[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch as plain training code makes it, a class for each text."""
    batch = padded([row | {"labels": row["ids"]} for row in rows], device)
    return batch | {"labels": torch.tensor([row["label"] for row in rows])}


def class_loss(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"])


def row(model: Loaded, shape: str, clients: int, rows: list[Example], repeats: int) -> str:
    """Measure one cell."""
    own = [rows[k * BATCH * STEPS : (k + 1) * BATCH * STEPS] for k in range(clients)]
    mean, longest = (
        max(found(len(r["ids"]) for r in part) for part in own) for found in (lambda sizes: sum(sizes) / 32, max)
    )
    by_mean, by_longest = (sorted(own, key=lambda part: found(len(r["ids"]) for r in part)) for found in (sum, max))
    sizes: dict[Mode, int] = {"packed": auto(model, BATCH * mean), "padded": auto(model, BATCH * longest)}

    parts = [[part[at : at + BATCH] for at in range(0, len(part), BATCH)] for part in own]

    def named(parts: list[list[Example]]) -> dict[str, list[Example]]:
        return {f"c{k:02}": part for k, part in enumerate(parts)}

    got = measure(
        {
            "loop": plain(model, parts, labelled, class_loss),
            "padded": blocks(model, named(by_longest), BATCH, sizes["padded"], "padded", classification),
            "one": blocks(model, named(by_mean), BATCH, 1, "packed", classification),
            "packed": blocks(model, named(by_mean), BATCH, sizes["packed"], "packed", classification),
        },
        repeats,
    )
    loop, old, one, new = (got[name] / STEPS for name in ("loop", "padded", "one", "packed"))
    return (
        f"| {shape} | {clients} | {sum(len(r['ids']) for part in own for r in part) // STEPS} | {loop:.0f} "
        f"| {min(clients, sizes['padded'])} | {old:.0f} | {one:.0f} | {min(clients, sizes['packed'])} | {new:.0f} "
        f"| {loop / new:.2f} | {old / new:.2f} | {one / new:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/banking77/train.jsonl")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # peft calls a name that transformers renames
    rows, lines = texts(options.data), []
    for shape in options.shapes:
        model = loaded(shape)
        for clients in options.clients:
            lines.append(row(model, shape, clients, rows, options.repeats))
            print(lines[-1], flush=True)
    head = (
        "| model | clients | tokens a step | loop | clients in a padded block | padded | one by one "
        "| clients in a packed block | packed | loop / packed | padded / packed | one by one / packed |"
    )
    PAGE.write_text(
        "# The engine: classification\n\n"
        f"CPU milliseconds of one step of all clients, {BATCH} texts of Banking77 each, "
        f"LoRA r=8, AdamW, clipping, float32; medians of {options.repeats} interleaved. Machine: one thread of "
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}. Written by `python "
        "benchmarks/engine_classes.py`, which says what the columns are.\n\n"
        f"{head}\n|{'---|' * (head.count('|') - 1)}\n" + "\n".join(lines) + "\n",
        encoding="utf8",
    )


if __name__ == "__main__":
    main()
