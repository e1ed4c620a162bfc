"""seq2seq: write an answer to an input, by an encoder-decoder such as T5; the loss counts the answer's tokens.

Records: question/answer, instruction/(input)/output, or prompt/completion.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from weft.core.metrics import added
from weft.core.task import Batch, Encoded, Example, Probe, Task
from weft.core.types import Metrics
from weft.tasks.head import label_losses
from weft.tasks.prompts import pieces
from weft.tasks.text_metrics import GENERATED, answer_rows, text_summary
from weft.tasks.tokens import IGNORE, sums_of


def seq2seq(
    template: str = "plain",
    max_length: Annotated[int, Field(gt=1)] = 512,
    max_answer: Annotated[int, Field(gt=1)] = 128,
    language: Literal["en", "zh"] = "en",
) -> Task:
    """Fine-tune an encoder-decoder; metrics: loss and perplexity, rouge (1, 2, L), bleu (4), exact_match.

    template: `plain` writes `Question: ...`; any other text is the input itself, such as "summarize: {prompt}".
    max_length, max_answer: in tokens; longer inputs and answers are cut at the end, and counted.
    language: as in causal_lm.
    """

    def encode(tokenizer: Any, records: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> Encoded:
        examples, truncated = [], 0
        for record in records:
            asked, answer = pieces(record, template, tokenizer, "seq2seq")
            ids = tokenizer(asked.text, verbose=False)["input_ids"]
            labels = _ended(tokenizer(text_target=answer.text.strip(), verbose=False)["input_ids"], tokenizer)
            truncated += len(ids) > max_length or len(labels) > max_answer
            if len(ids) > max_length:
                ids = tokenizer(asked.text, truncation=True, max_length=max_length)["input_ids"]
            examples.append({
                "ids": torch.tensor(ids),
                "labels": torch.tensor(labels[:max_answer]),
                "reference": answer.text.strip(),
            })  # fmt: skip
        return Encoded(examples, truncated)

    def each(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> list[Metrics]:
        return answer_rows(probe, examples, metrics, (_collate, _loss), language)

    return Task(
        auto="AutoModelForSeq2SeqLM",
        peft_type="SEQ_2_SEQ_LM",
        needs=(("question", "answer"), ("instruction", "output"), ("prompt", "completion")),
        metrics=("loss", *GENERATED),
        classes=lambda records: (),
        encode=encode,
        collate=_collate,
        loss=_loss,
        shorten=_shorten,
        measure=lambda probe, examples, metrics: added(each(probe, examples, metrics)),
        each=each,
        summarize=_summarize,
    )


def _ended(labels: list[int], tokenizer: Any) -> list[int]:
    """Return an answer with its end, which most tokenizers of encoder-decoders write by themselves."""
    end = tokenizer.eos_token_id
    return labels if end is None or labels[-1:] == [end] else [*labels, end]


def _shorten(example: Example, longest: int) -> Example:
    return {**example, "ids": example["ids"][:longest], "labels": example["labels"][:longest]}


def _collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    """Pad inputs and answers on the right; a filler row has one token and no label."""
    most = max(map(len, rows))
    filler = {"ids": torch.tensor([pad]), "labels": torch.tensor([IGNORE])}
    filled = [row for part in rows for row in [*part, *[filler] * (most - len(part))]]
    ids, labels = [row["ids"] for row in filled], [row["labels"] for row in filled]
    flat = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    index = (flat.flatten() != IGNORE).nonzero()[:, 0]
    before = functional.pad(flat[:, :-1], (1, 0), value=IGNORE)
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "before": before.masked_fill(before == IGNORE, pad),
        "index": index,
        "targets": flat.flatten()[index],
        "counts": [sum(len(row["labels"]) for row in part) for part in rows],
        "own": [
            (len(part), max((len(row[key]) for row in part for key in ("ids", "labels")), default=1)) for part in rows
        ],
    }


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Read each answer behind the model's own first token; its padding stands at the end, where nothing looks back."""
    net: Any = model
    given = batch["before"].clone()
    given[:, 0] = net.config.decoder_start_token_id
    asked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": given}
    losses = label_losses(net, batch, given.shape[1], lambda: net(**asked, use_cache=False).logits)
    sums = sums_of(losses, batch["counts"])
    return sums, torch.tensor(batch["counts"], device=sums.device)


def _summarize(sums: Metrics) -> Metrics:
    loss = sums["nll"] / sums["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **text_summary(sums)}
