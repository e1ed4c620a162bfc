"""causal_lm: continue a prompt with an answer, or plain text; the loss counts the answer's tokens only.

Records: question/answer, instruction/(input)/output, prompt/completion, messages, or text (all of it is learned).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from weft.core.metrics import added
from weft.core.trees import at_least_float32, on_device
from weft.core.types import Batch, Encoded, Example, Metrics, Probe, Task
from weft.tasks.prompts import Piece, pieces
from weft.tasks.text_metrics import text_rows, text_summary

IGNORE = -100  # the label of a token that the loss does not count


def causal_lm(
    template: str = "auto",
    max_length: Annotated[int, Field(gt=1)] = 512,
) -> Task:
    """Fine-tune a language model on answers; metrics: loss and perplexity, rouge (1, 2, L), bleu (4).

    template: `chat` uses the tokenizer's own chat template, `plain` writes `Question: ...`, `auto` takes chat where
    the tokenizer has one; any other text is the prompt itself, such as "Q: {question}\\nA:".
    max_length: in tokens; longer answers are cut at the end, longer prompts at the start; both are counted.
    """

    def encode(tokenizer: Any, records: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> Encoded:
        examples, truncated = [], 0
        for record in records:
            parts = pieces(record, template, tokenizer)
            example = _example(parts, tokenizer)
            cut = _cut(example, max_length, tokenizer.bos_token_id)
            truncated += len(cut["ids"]) < len(example["ids"])
            if bool((cut["labels"][1:] != IGNORE).any()):
                examples.append(cut)
        return Encoded(examples, truncated, len(records) - len(examples))

    return Task(
        auto="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        needs=(
            ("question", "answer"),
            ("instruction", "output"),
            ("prompt", "completion"),
            ("messages",),
            ("text",),
        ),
        metrics=("loss", "rouge", "bleu"),
        classes=lambda records: (),
        encode=encode,
        collate=_collate,
        loss=_loss,
        shorten=_shorten,
        pack=_pack,
        measure=lambda probe, examples, metrics: added(_each(probe, examples, metrics)),
        each=_each,
        summarize=_summarize,
    )


def _example(parts: Sequence[Piece], tokenizer: Any) -> Example:
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


def _cut(example: Example, longest: int, bos: int | None) -> Example:
    """Cut an example to `longest` tokens: a prompt keeps its last half at least, the answer its beginning.

    A prompt that is cut keeps its beginning-of-sequence token, without which some models write nonsense.
    """
    ids, labels, prompt = example["ids"], example["labels"], example["prompt"]
    drop = max(0, min(prompt - longest // 2, len(ids) - longest))
    if prompt <= longest // 2:
        drop = 0
    kept = int(drop > 0 and bos is not None and int(ids[0]) == bos)
    ids, labels = (torch.cat([row[:kept], row[drop + kept :]])[:longest] for row in (ids, labels))
    return {**example, "ids": ids, "labels": labels, "prompt": prompt - drop}


def _shorten(example: Example, longest: int) -> Example:
    learned = int((example["labels"][1:] != IGNORE).nonzero()[0]) + 2
    return {
        key: value[: max(longest, learned)] if key in ("ids", "labels") else value for key, value in example.items()
    }


def _targets(rows: Sequence[Sequence[Example]]) -> list[list[Tensor]]:
    """Return for each example, client by client, the label of each position's next token."""
    return [[functional.pad(row["labels"][1:], (0, 1), value=IGNORE) for row in part] for part in rows]


def _counts(targets: Sequence[Sequence[Tensor]]) -> list[int]:
    return [sum(int((row != IGNORE).sum()) for row in part) for part in targets]


def _collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
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


def _pack(rows: Sequence[Sequence[Example]]) -> Batch:
    targets = _targets(rows)
    ids = [row["ids"] for part in rows for row in part]
    flat = torch.cat([row for part in targets for row in part])
    index = (flat != IGNORE).nonzero()[:, 0]
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
        "index": index,
        "targets": flat[index],
        "counts": _counts(targets),
        "lengths": [len(row) for row in ids],
        "tokens": [sum(len(row["ids"]) for row in part) for part in rows],
    }


@contextmanager
def _only(model: Any, index: Tensor, length: int) -> Iterator[None]:
    """Apply the output layer to the positions that have a label, and to no other.

    index: into the rows laid end to end. length: tokens of a row; virtual tokens that an adapter put in front of
    them make the rows longer here, and are skipped.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda module, args: (args[0][..., -length:, :].flatten(0, -2)[index].unsqueeze(0),)
    )
    try:
        yield
    finally:
        hook.remove()


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with _only(model, batch["index"], batch["input_ids"].shape[-1]):
        logits = model(**given, use_cache=False).logits[0]
    losses = functional.cross_entropy(at_least_float32(logits), batch["targets"], reduction="none")
    sums = torch.stack([part.sum() for part in losses.split(batch["counts"])])
    return sums, torch.tensor(batch["counts"], device=sums.device)


def _each(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> list[Metrics]:
    """Return of each example the loss over its labels and, of the first `generated`, what its text scores."""
    rows: list[Metrics] = [{} for _ in examples]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["ids"]))  # alike lengths share a batch
    device = next(probe.model.parameters()).device
    for start in range(0, len(order), probe.batch):
        chosen = order[start : start + probe.batch]
        batch = on_device(_collate([[examples[i]] for i in chosen], probe.tokenizer.pad_token_id), device)
        losses, tokens = _loss(probe.model, batch)
        for i, loss, count in zip(chosen, losses.tolist(), tokens.tolist(), strict=True):
            rows[i] = {"nll": loss, "tokens": float(count), "count": 1.0}
    if {"rouge", "bleu"} & set(metrics):
        for i, row in enumerate(text_rows(probe, examples[: probe.generated])):
            rows[i] |= row
    return rows


def _summarize(sums: Metrics) -> Metrics:
    loss = sums["nll"] / sums["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **text_summary(sums)}
