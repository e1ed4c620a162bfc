"""causal_lm: continue a prompt with an answer, or plain text; the loss counts the answer's tokens only.

Records: question/answer, instruction/(input)/output, prompt/completion, messages, or text (all of it is learned).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from weft.core.types import Batch, Encoded, Example, Metrics, Probe, Task
from weft.tasks.prompts import Piece, pieces
from weft.tasks.text_metrics import text_sums, text_summary

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
            cut = _cut(example, max_length)
            truncated += len(cut["ids"]) < len(example["ids"])
            if bool((cut["labels"][1:] != IGNORE).any()):
                examples.append(cut)
        return Encoded(examples, truncated, len(records) - len(examples))

    return Task(
        auto="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        needs=(("question", "answer"), ("instruction", "output"), ("prompt", "completion"), ("messages",), ("text",)),
        metrics=("loss", "rouge", "bleu"),
        classes=lambda records: (),
        encode=encode,
        collate=_collate,
        loss=_loss,
        measure=_measure,
        summarize=_summarize,
    )


def _example(parts: Sequence[Piece], tokenizer: Any) -> Example:
    """Tokenise piece by piece, so that a label never stands on a token shared with the prompt."""
    ids: list[int] = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) else []
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
        "reference": parts[-1].text.strip(),
    }


def _starts_with_bos(tokenizer: Any) -> bool:
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _cut(example: Example, longest: int) -> Example:
    """Cut an example to `longest` tokens: a prompt keeps its last half at least, the answer its beginning."""
    ids, labels, prompt = example["ids"], example["labels"], example["prompt"]
    drop = max(0, min(prompt - longest // 2, len(ids) - longest))
    if prompt <= longest // 2:
        drop = 0
    return {
        **example,
        "ids": ids[drop:][:longest],
        "labels": labels[drop:][:longest],
        "prompt": prompt - drop,
    }


def _collate(examples: Sequence[Example], pad: int) -> Batch:
    ids = [example["ids"] for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in examples], batch_first=True, padding_value=IGNORE),
    }


def _loss(model: nn.Module, batch: Batch, clients: int) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="none"
    )
    return losses.view(clients, -1).sum(1), (targets != IGNORE).view(clients, -1).sum(1)


def _measure(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> Metrics:
    sums: Metrics = {"nll": 0.0, "tokens": 0.0, "count": float(len(examples))}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["ids"]))  # alike lengths share a batch
    device = next(probe.model.parameters()).device
    for start in range(0, len(order), probe.batch):
        rows = [examples[i] for i in order[start : start + probe.batch]]
        batch = {name: tensor.to(device) for name, tensor in _collate(rows, probe.tokenizer.pad_token_id).items()}
        loss, tokens = _loss(probe.model, batch, 1)
        sums["nll"] += float(loss)
        sums["tokens"] += float(tokens)
    if {"rouge", "bleu"} & set(metrics):
        sums |= text_sums(probe, examples[: probe.generated])
    return sums


def _summarize(sums: Metrics) -> Metrics:
    loss = sums["nll"] / sums["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **text_summary(sums)}
