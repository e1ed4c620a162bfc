"""image_text: pictures and their captions brought together by contrast, as CLIP was trained (Radford et al. 2021).

arXiv:2103.00020. Symmetric InfoNCE: in a mini-batch each picture must find its own caption among all, and each caption
its picture. The others that it is told from are those of the client's own mini-batch and no other's. The temperature
(`logit_scale`) is not trained: it stays the base's, so clients' losses are on one scale.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from weft.core.errors import JobError
from weft.core.task import Batch, Encoded, Example, Probe, Task
from weft.core.trees import at_least_float32, on_device
from weft.core.types import Metrics
from weft.tasks.image_classification import patches
from weft.tasks.retrieval import Gallery, retrieval_summary, retrieval_sums

FEW = 4  # rows of a client at least: products of fewer round otherwise than those of many
WIDE = 16  # tokens


def image_text(
    max_length: Annotated[int, Field(gt=2)] = 77,
    classes: tuple[Annotated[str, Field(min_length=1)], ...] = (),
    prompt: Annotated[str, Field(pattern=r"\{\}")] = "{}",
) -> Task:
    """Fine-tune both towers on `image` with `caption`; metrics: loss, recall (at 1 and 5, both ways), accuracy.

    max_length: longer captions are cut, in tokens, and counted. classes: names for zero-shot accuracy; each record
    then has one of them as its `label`, and the model must tell which by the captions that `prompt` makes of them,
    such as "a picture of {}". loss and recall are taken among all records of a test group.
    """
    if len(set(classes)) != len(classes) or len(classes) == 1:
        raise JobError("task.image_text.classes: name two or more, each once")
    numbers = {name: i for i, name in enumerate(classes)}

    def words(processor: Any, text: str) -> Tensor:
        return torch.tensor(processor.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])

    def encode(processor: Any, records: Sequence[Mapping[str, Any]], unused: tuple[str, ...]) -> Encoded:
        examples, truncated = [], 0
        for record in records:
            whole = processor.tokenizer(record["caption"], truncation=False, verbose=False)["input_ids"]
            truncated += len(whole) > max_length
            example = {"pixels": processor.pixels(record["image"]), "ids": words(processor, record["caption"])}
            example |= {"picture": record["image"], "caption": record["caption"]}
            examples.append(example | ({"label": _number(record, numbers)} if classes else {}))
        return Encoded(examples, truncated)

    def measure(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> Metrics:
        pictures, captions = _embedded(probe, examples)
        scale = float(_scale(probe.model))
        sums = retrieval_sums(_gallery(examples, pictures, captions), scale)
        if "accuracy" in metrics:
            asked = [{"ids": words(probe.tokenizer, prompt.replace("{}", name))} for name in classes]
            near = pictures @ _all(probe, asked, _captions).T
            labels = torch.tensor([example["label"] for example in examples], device=near.device)
            sums["right"] = float((near.argmax(1) == labels).sum())
        return sums

    return Task(
        auto="AutoModel",
        peft_type="FEATURE_EXTRACTION",
        needs=(("image", "caption", *(["label"] if classes else [])),),
        metrics=("loss", "recall", *(["accuracy"] if classes else [])),
        classes=lambda records: (),
        encode=encode,
        collate=_collate,
        loss=_loss,
        shorten=_shorten,
        measure=measure,
        summarize=retrieval_summary,
        reads=("text", "images"),
        length=lambda example: patches(example["pixels"]) + len(example["ids"]),
        least=2,
        per_example=False,
        frozen=("logit_scale",),
    )


def _number(record: Mapping[str, Any], numbers: Mapping[str, int]) -> int:
    name = str(record["label"])
    if name not in numbers:
        raise JobError("task.image_text.classes: a record has a label that is not among them; add it")
    return numbers[name]


def _shorten(example: Example, longest: int) -> Example:
    """Keep a caption's last token, at which the model reads it."""
    ids = example["ids"]
    return {**example, "ids": torch.cat([ids[: max(0, min(longest, len(ids)) - 1)], ids[-1:]])}


def _padded(ids: Sequence[Tensor], pad: int) -> Batch:
    """Pad to a multiple of WIDE: sums over a row then have the same bits, whatever longer rows stand beside it."""
    written = pad_sequence(list(ids), batch_first=True, padding_value=pad)
    there = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    more = (0, -written.shape[1] % WIDE)
    return {"input_ids": functional.pad(written, more, value=pad), "attention_mask": functional.pad(there, more)}


def _collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    most = max(FEW, *map(len, rows))
    some = next(row for part in rows for row in part)
    filler = {"pixels": torch.zeros_like(some["pixels"]), "ids": some["ids"][-1:]}
    filled = [row for part in rows for row in [*part, *[filler] * (most - len(part))]]
    return {
        **_padded([row["ids"] for row in filled], pad),
        "pixel_values": torch.stack([row["pixels"] for row in filled]),
        "counts": [len(part) for part in rows],
    }


# --- the model


def _pictures(model: Any, batch: Batch) -> Tensor:
    """Return embeddings of length 1, (rows, size)."""
    found = model.get_image_features(pixel_values=batch["pixel_values"])
    return functional.normalize(at_least_float32(found.pooler_output), dim=-1)


def _captions(model: Any, batch: Batch) -> Tensor:
    room = model.config.text_config.max_position_embeddings
    found = model.get_text_features(
        input_ids=batch["input_ids"][:, :room], attention_mask=batch["attention_mask"][:, :room]
    )
    return functional.normalize(at_least_float32(found.pooler_output), dim=-1)


def _scale(model: Any) -> Tensor:
    return at_least_float32(model.logit_scale.detach()).exp()


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each client's loss summed over its pictures and its captions, halved; the others' rows are no negatives.

    Shapes: embeddings (clients, rows, size), similarities (clients, rows, rows).
    """
    clients = len(batch["counts"])
    pictures, captions = (
        rows.view(clients, -1, rows.shape[-1]) for rows in (_pictures(model, batch), _captions(model, batch))
    )
    near = _scale(model) * torch.stack([own @ told.mT for own, told in zip(pictures, captions, strict=True)])
    count = torch.tensor(batch["counts"], device=near.device)
    real = torch.arange(near.shape[1], device=near.device) < count.unsqueeze(1)  # (clients, rows): no fillers
    lowest = torch.finfo(near.dtype).min
    losses = [
        -side.masked_fill(~real.unsqueeze(1), lowest).log_softmax(-1).diagonal(dim1=1, dim2=2)
        for side in (near, near.mT)
    ]
    return (0.5 * (losses[0] + losses[1])).masked_fill(~real, 0.0).sum(1), count


# --- measuring


def _all(probe: Probe, examples: Sequence[Example], embed: Any) -> Tensor:
    """Embed examples batch by batch, (examples, size)."""
    device = next(probe.model.parameters()).device
    found = []
    for start in range(0, len(examples), probe.batch):
        rows = examples[start : start + probe.batch]
        batch = _padded([row["ids"] for row in rows], probe.tokenizer.pad_token_id)
        if "pixels" in rows[0]:
            batch["pixel_values"] = torch.stack([row["pixels"] for row in rows])
        found.append(embed(probe.model, on_device(batch, device)))
    return torch.cat(found)


def _embedded(probe: Probe, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    return _all(probe, examples, _pictures), _all(probe, examples, _captions)


def _gallery(examples: Sequence[Example], pictures: Tensor, captions: Tensor) -> Gallery:
    return Gallery(
        pictures, captions, [example["picture"] for example in examples], [example["caption"] for example in examples]
    )
