"""Prompts and answers as tokens: labels, what is cut, batches padded or packed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from weft.core.task import Batch, Example
from weft.tasks.prompts import Piece

IGNORE = -100  # the label of a token that the loss does not count


def example_of(parts: Sequence[Piece], tokenizer: Any) -> Example:
    """Tokenise piece by piece, so that a label never stands on a token shared with the prompt."""
    written = bool(tokenizer.bos_token) and parts[0].text.startswith(tokenizer.bos_token)  # by a chat template
    ids: list[int] = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) and not written else []
    labels = [IGNORE] * len(ids)
    prompt = 0
    for piece in parts:
        if piece.learned:
            prompt = len(ids)
        new = tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        if piece.ends and tokenizer.eos_token_id is not None:
            new = [*new, tokenizer.eos_token_id]
        ids.extend(new)
        labels.extend(new if piece.learned else [IGNORE] * len(new))
    return {
        "ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "prompt": prompt,
        "reference": (parts[-1].said or parts[-1].text).strip(),
    }


def _starts_with_bos(tokenizer: Any) -> bool:
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def surplus(example: Example, longest: int) -> int:
    """Return how many tokens a prompt loses at its start, where an example may have `longest`.

    It keeps half of them at least, and more where the answer is short.
    """
    prompt: int = example["prompt"]
    return max(0, min(prompt - longest // 2, len(example["ids"]) - longest))


def cut(example: Example, longest: int, bos: int | None, drop: int | None = None) -> Example:
    """Cut an example to `longest` tokens: its prompt at the start, by `surplus` or `drop`, its answer at the end.

    A prompt that is cut keeps its beginning-of-sequence token, without which some models write nonsense.
    """
    ids, labels, prompt = example["ids"], example["labels"], example["prompt"]
    drop = surplus(example, longest) if drop is None else drop
    kept = int(drop > 0 and bos is not None and int(ids[0]) == bos)
    ids, labels = (torch.cat([row[:kept], row[drop + kept :]])[:longest] for row in (ids, labels))
    return {**example, "ids": ids, "labels": labels, "prompt": prompt - drop}


def learnable(example: Example) -> bool:
    """Tell whether a token is left that can be learned: the first has nothing before it."""
    return bool((example["labels"][1:] != IGNORE).any())


def shorten(example: Example, longest: int) -> Example:
    """Cut an example to `longest` tokens, its first learned one left in it."""
    learned = int((example["labels"][1:] != IGNORE).nonzero()[0]) + 2
    return {
        key: value[: max(longest, learned)] if key in ("ids", "labels") else value for key, value in example.items()
    }


def _targets(rows: Sequence[Sequence[Example]]) -> list[list[Tensor]]:
    """Return for each example, client by client, the label of each position's next token."""
    return [[functional.pad(row["labels"][1:], (0, 1), value=IGNORE) for row in part] for part in rows]


def _counts(targets: Sequence[Sequence[Tensor]]) -> list[int]:
    return [sum(int((row != IGNORE).sum()) for row in part) for part in targets]


def collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    """Pad the examples of each client on the right; `index` and `targets`: where labels stand, rows end to end."""
    most = max(map(len, rows))
    filler = torch.tensor([pad])
    ids = [row for part in rows for row in [*(r["ids"] for r in part), *[filler] * (most - len(part))]]
    targets = _targets(rows)
    filled = [[*part, *[torch.full_like(filler, IGNORE)] * (most - len(part))] for part in targets]
    flat = pad_sequence([row for part in filled for row in part], batch_first=True, padding_value=IGNORE).flatten()
    index = (flat != IGNORE).nonzero()[:, 0]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "index": index,
        "targets": flat[index],
        "counts": _counts(targets),
    }


def end_to_end(rows: Sequence[Sequence[Example]]) -> Batch:
    """Lay the tokens of all clients' examples end to end in one row."""
    ids = [row["ids"] for part in rows for row in part]
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
        "lengths": [len(row) for row in ids],
        "tokens": [sum(len(row["ids"]) for row in part) for part in rows],
    }


def pack(rows: Sequence[Sequence[Example]]) -> Batch:
    """Lay the examples of all clients end to end; `index` and `targets`: where labels stand."""
    targets = _targets(rows)
    flat = torch.cat([row for part in targets for row in part])
    index = (flat != IGNORE).nonzero()[:, 0]
    return {**end_to_end(rows), "index": index, "targets": flat[index], "counts": _counts(targets)}


def sums_of(losses: Tensor, counts: Sequence[int]) -> Tensor:
    """Add up consecutive losses, so many at a time, (len(counts),)."""
    return torch.stack([part.sum() for part in losses.split(list(counts))])
