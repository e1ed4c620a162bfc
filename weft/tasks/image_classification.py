"""image_classification: one label for a picture, by a new head on a pretrained image encoder, such as a ViT.

The head is new for every task, so it is part of the adapter: trained, sent, averaged and saved with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.core.errors import JobError
from weft.core.task import Batch, Encoded, Example, Probe, Task
from weft.core.trees import at_least_float32, on_device
from weft.core.types import Metrics
from weft.tasks.labels import classes_of, confusion, summarize

IGNORE = -100  # the label of a filler row
PATCH = 16  # pixels of a side; what most encoders cut pictures into


def image_classification() -> Task:
    """Learn `label` from `image`, the path of a picture beside the data file; metrics: loss, accuracy, macro_f1.

    Each picture goes through the base's own image processor once, before training, and stays in memory as it comes
    out: 0.6 MB for 224 x 224 pixels.
    """
    return Task(
        auto="AutoModelForImageClassification",
        peft_type="FEATURE_EXTRACTION",
        needs=(("image", "label"),),
        metrics=("loss", "accuracy", "macro_f1"),
        classes=classes_of,
        encode=_encode,
        collate=_collate,
        loss=_loss,
        shorten=lambda example, longest: example,
        measure=_measure,
        summarize=summarize,
        reads=("images",),
        length=lambda example: patches(example["pixels"]),
    )


def patches(pixels: Tensor) -> int:
    """Return about how many tokens a picture is in the model."""
    return max(1, pixels[0].numel() // PATCH**2)


def _encode(processor: Any, records: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> Encoded:
    numbers = {name: i for i, name in enumerate(classes)}
    examples = []
    for record in records:
        name = str(record["label"])
        if name not in numbers:
            raise JobError("a test record has a label that no training record has")
        examples.append({"pixels": processor.pixels(record["image"]), "label": numbers[name]})
    return Encoded(examples)


def _collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    most = max(map(len, rows))
    filler = {"pixels": torch.zeros_like(next(row for part in rows for row in part)["pixels"]), "label": IGNORE}
    filled = [row for part in rows for row in [*part, *[filler] * (most - len(part))]]
    return {
        "pixel_values": torch.stack([row["pixels"] for row in filled]),
        "labels": torch.tensor([row["label"] for row in filled]),
        "counts": [len(part) for part in rows],
    }


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return at_least_float32(model(pixel_values=batch["pixel_values"]).logits)


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(_logits(model, batch), batch["labels"], ignore_index=IGNORE, reduction="none")
    sums = losses.view(len(batch["counts"]), -1).sum(1)
    return sums, torch.tensor(batch["counts"], device=sums.device)


def _measure(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> Metrics:
    sums: Metrics = {"loss": 0.0, "count": 0.0}
    for start in range(0, len(examples), probe.batch):
        batch = _collate([examples[start : start + probe.batch]], 0)
        batch = on_device(batch, next(probe.model.parameters()).device)
        confusion(sums, _logits(probe.model, batch), batch["labels"])
    return sums
