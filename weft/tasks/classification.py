"""classification: one label for a text, by a head on a pretrained encoder or decoder.

The head is new for every task, so it is part of the adapter: trained, sent, averaged and saved with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from weft.core.errors import JobError
from weft.core.metrics import added
from weft.core.task import Batch, Encoded, Example, Probe, Task
from weft.core.trees import at_least_float32, on_device
from weft.core.types import Metrics
from weft.tasks.labels import classes_of, summarize
from weft.tasks.tokens import end_to_end, sums_of

IGNORE = -100  # the label of a filler row


def classification(max_length: Annotated[int, Field(gt=1)] = 128) -> Task:
    """Learn `label` from `text`; metrics: loss, accuracy, macro_f1.

    max_length: longer texts are cut, in tokens, and counted.
    """

    def encode(tokenizer: Any, records: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> Encoded:
        numbers = {name: i for i, name in enumerate(classes)}
        examples, truncated = [], 0
        texts = [record["text"] for record in records]
        rows = tokenizer(texts, truncation=False, verbose=False)["input_ids"] if texts else []
        for record, ids in zip(records, rows, strict=True):
            name = str(record["label"])
            if name not in numbers:
                raise JobError(f"a test record has the label `{name[:40]}`, which no training record has")
            if len(ids) > max_length:
                ids, truncated = (
                    tokenizer(record["text"], truncation=True, max_length=max_length)["input_ids"],
                    truncated + 1,
                )
            examples.append({"ids": torch.tensor(ids), "label": numbers[name]})
        return Encoded(examples, truncated)

    return Task(
        auto="AutoModelForSequenceClassification",
        peft_type="SEQ_CLS",
        needs=(("text", "label"),),
        metrics=("loss", "accuracy", "macro_f1"),
        classes=classes_of,
        encode=encode,
        collate=_collate,
        loss=_loss,
        shorten=_shorten,
        pack=_pack,
        measure=lambda probe, examples, metrics: added(_each(probe, examples, metrics)),
        each=_each,
        summarize=summarize,
    )


def _shorten(example: Example, longest: int) -> Example:
    return {**example, "ids": example["ids"][:longest]}


def _collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    most = max(map(len, rows))
    filler = {"ids": torch.tensor([pad]), "label": IGNORE}
    filled = [row for part in rows for row in [*part, *[filler] * (most - len(part))]]
    ids = [row["ids"] for row in filled]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([row["label"] for row in filled]),
        "counts": [len(part) for part in rows],
    }


def _pack(rows: Sequence[Sequence[Example]]) -> Batch:
    labels = torch.tensor([row["label"] for part in rows for row in part])
    return {**end_to_end(rows), "labels": labels, "counts": [len(part) for part in rows]}


@contextmanager
def _last(model: Any, mask: Tensor) -> Iterator[None]:
    """Let a decoder's head read the last token of each row where virtual tokens stand in front of it.

    transformers finds that token by the ids; with virtual tokens there are none, and it takes the last position,
    which may be padding.
    """
    head = getattr(model, "score", None)  # a decoder's; an encoder's is `classifier` and reads the first position
    length = mask.shape[1]
    ends = length - 1 - mask.flip(1).argmax(1)

    def chosen(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        extra = args[0].shape[1] - length
        if extra <= 0:
            return args
        return (args[0][torch.arange(len(ends), device=ends.device), ends + extra].unsqueeze(1),)

    hook = head.register_forward_pre_hook(chosen) if head is not None else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def _of_examples(model: Any, batch: Batch) -> Tensor:
    """Return the scores of each example of a packed row, (examples, classes).

    A decoder's head is applied to every token, and its last ones are read before transformers looks for one. Whatever
    comes behind an encoder's layers sees the first tokens in place of the row.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, head = getattr(inner, inner.base_model_prefix), getattr(model, "score", None)
    ends = torch.tensor(batch["lengths"], device=batch["input_ids"].device).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    found: list[Tensor] = []

    def body_done(module: nn.Module, args: Any, out: Any) -> None:
        out.last_hidden_state = out.last_hidden_state[0, starts].unsqueeze(1)

    with ExitStack() as hooks:
        if head is not None:
            hook = head.register_forward_hook(lambda module, args, out: found.append(out[0, ends - 1]))
            hooks.callback(hook.remove)
        else:
            if pooler := getattr(body, "pooler", None):
                hook = pooler.register_forward_pre_hook(lambda module, args: args[0][0, starts].unsqueeze(1))
                hooks.callback(hook.remove)
            hooks.callback(body.register_forward_hook(body_done).remove)
        positions = batch["position_ids"] + _first_position(body)
        logits: Tensor = model(input_ids=batch["input_ids"], position_ids=positions).logits
    return found[0] if found else logits


def _first_position(body: nn.Module) -> int:
    """Return the number of a text's first position: behind that of padding, where a table has one for it."""
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    return 0 if getattr(table, "padding_idx", None) is None else int(table.padding_idx) + 1  # type: ignore[union-attr]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    if "lengths" in batch:
        return at_least_float32(_of_examples(model, batch))
    mask = batch["attention_mask"]
    with _last(model, mask):
        return at_least_float32(model(input_ids=batch["input_ids"], attention_mask=mask).logits)


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(_logits(model, batch), batch["labels"], ignore_index=IGNORE, reduction="none")
    sums = sums_of(losses, batch["counts"]) if "lengths" in batch else losses.view(len(batch["counts"]), -1).sum(1)
    return sums, torch.tensor(batch["counts"], device=sums.device)


def _each(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> list[Metrics]:
    """Return of each example the loss, the count, and the confusion count `true>predicted`."""
    rows: list[Metrics] = []
    for start in range(0, len(examples), probe.batch):
        batch = _collate([examples[start : start + probe.batch]], probe.tokenizer.pad_token_id)
        batch = on_device(batch, next(probe.model.parameters()).device)
        logits = _logits(probe.model, batch)
        losses = functional.cross_entropy(logits, batch["labels"], reduction="none").tolist()
        pairs = zip(batch["labels"].tolist(), logits.argmax(1).tolist(), strict=True)
        rows += [
            {"loss": loss, "count": 1.0, f"{true}>{predicted}": 1.0}
            for loss, (true, predicted) in zip(losses, pairs, strict=True)
        ]
    return rows
