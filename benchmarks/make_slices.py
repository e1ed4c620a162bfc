"""Make the example data and the tokenizer of tiny-bert again, byte for byte, from the full sets.

    python benchmarks/make_slices.py SOURCE [TARGET]

SOURCE holds `medquad/` and `banking77/`, each with its train and test file (the READMEs under examples/data
say where the sets come from). TARGET is the folder of examples, by default the one beside this script's.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from weft.core.keys import number

Record = dict[str, Any]

SEED = 20_240_229
MEDQUAD = {"train": 40, "test": 20}  # pairs of each institute
BANKING = {"train": 50, "test": 20}  # rows of each intent
PREFERENCES = {"train": 24, "test": 10}  # pairs of each intent
PREFERRED = slice(0, None, 3)  # of the intents
INTENTS = 20
ANSWER = (60, 600)  # characters
VOCABULARY = 1_600
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MEDQUAD_FIELDS = ("question", "answer", "source", "qtype", "focus", "doc_id")


def main() -> None:
    """Write both slices and the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=Path(__file__).parents[1] / "examples")
    folders = parser.parse_args()
    for part in ("train", "test"):
        pairs = read_lines(folders.source / "medquad" / f"{part}.jsonl.gz")
        write_lines(folders.target / "data" / "medquad" / f"{part}.jsonl", medquad(pairs, MEDQUAD[part]))
    parts = {part: read_lines(folders.source / "banking77" / f"{part}.jsonl") for part in BANKING}
    intents = chosen_intents(parts["train"])
    slices = {part: banking77(rows, intents, BANKING[part]) for part, rows in parts.items()}
    for part, rows in slices.items():
        write_lines(folders.target / "data" / "banking77" / f"{part}.jsonl", rows)
        pairs = preferences(rows, intents[PREFERRED], PREFERENCES[part], part)
        write_lines(folders.target / "data" / "preferences" / f"{part}.jsonl", pairs)
    write_tokenizer(folders.target / "models" / "tiny-bert", [row["text"] for row in slices["train"]])


def draw(rows: Sequence[Record], count: int, *address: str) -> list[Record]:
    """Draw rows without replacement and keep their order; the draw is a hash, so the same everywhere."""
    ranked = sorted(range(len(rows)), key=lambda place: number(SEED, "slices", *address, place))
    return [rows[place] for place in sorted(ranked[:count])]


def medquad(pairs: Sequence[Record], count: int) -> list[Record]:
    """Draw pairs of each institute, in its order, among those whose answer is neither short nor long."""
    chosen: list[Record] = []
    for source in dict.fromkeys(pair["source"] for pair in pairs):
        own = [pair for pair in pairs if pair["source"] == source and len(pair["answer"]) >= ANSWER[0]]
        fit = [pair for pair in own if len(pair["answer"]) <= ANSWER[1]]
        longer = sorted((pair for pair in own if pair not in fit), key=lambda pair: len(pair["answer"]))
        chosen += draw(fit, count, "medquad", source) + longer[: max(0, count - len(fit))]
    return [{field: pair[field] for field in MEDQUAD_FIELDS} for pair in chosen]


def chosen_intents(rows: Sequence[Record]) -> list[str]:
    """Draw intents among those with enough rows, in the order of the full set's labels."""
    counts: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["label"]):
        counts[row["intent"]] = counts.get(row["intent"], 0) + 1
    enough = [{"intent": intent} for intent, count in counts.items() if count >= BANKING["train"]]
    return [row["intent"] for row in draw(enough, INTENTS, "banking77", "intents")]


def banking77(rows: Sequence[Record], intents: Sequence[str], count: int) -> list[Record]:
    """Draw rows of each intent and number the intents from 0."""
    return [
        {"text": row["text"], "intent": intent, "label": label}
        for label, intent in enumerate(intents)
        for row in draw(of_intent(rows, intent), count, "banking77", intent)
    ]


def preferences(rows: Sequence[Record], intents: Sequence[str], count: int, part: str) -> list[Record]:
    """Prefer what a question is about to what another intent's is about, drawn anew for each question."""
    pairs = []
    for place, row in enumerate(row for intent in intents for row in of_intent(rows, intent)[:count]):
        others = [intent for intent in intents if intent != row["intent"]]
        other = others[number(SEED, "slices", "preferences", part, place) % len(others)]
        pairs.append({
            "prompt": f"{row['text']}\nThis is about:",
            "chosen": row["intent"].replace("_", " "),
            "rejected": other.replace("_", " "),
            "intent": row["intent"],
        })  # fmt: skip
    return pairs


def of_intent(rows: Sequence[Record], intent: str) -> list[Record]:
    """Return the rows of one intent."""
    return [row for row in rows if row["intent"] == intent]


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Train a lower-case WordPiece tokenizer on texts and write it as transformers reads it."""
    from tokenizers import models, processors

    vocabulary = trained_vocabulary(texts)
    tokenizer = bert_tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    value = json.loads(tokenizer.to_str())
    value["model"]["vocab"] = vocabulary
    write_json(folder / "tokenizer.json", value)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings | SPECIAL)
    write_json(folder / "special_tokens_map.json", SPECIAL)


def trained_vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """Return the words and pieces of words that WordPiece training keeps, in the order of their numbers."""
    from tokenizers import models, trainers

    scratch = bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    # Left to the trainer, the letters' order, and with it the choice between equal pieces, varies by run.
    letters = sorted({letter for text in texts for letter in scratch.normalizer.normalize_str(text)} - {" "})
    fixed = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=fixed, show_progress=False)
    scratch.train_from_iterator(texts, trainer)
    return dict(sorted(scratch.get_vocab().items(), key=lambda item: item[1]))


def bert_tokenizer(model: Any) -> Any:
    """Return a tokenizer that cleans and splits text as BERT's does."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def read_lines(path: Path) -> list[Record]:
    """Read a file of JSON lines, compressed or not."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return [json.loads(line) for line in text.split("\n") if line]


def write_lines(path: Path, rows: Iterable[Record]) -> None:
    """Write a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
