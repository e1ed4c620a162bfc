"""What tasks with labels share: the label set, the confusion counts and the metrics made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from weft.core.errors import JobError
from weft.core.types import Metrics


def classes_of(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the labels in order: by number where all are numbers, else by name."""
    names = {str(record["label"]) for record in records}
    if len(names) < 2:
        raise JobError("data.train: classification needs at least two labels")
    numeric = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


def confusion(sums: Metrics, logits: Tensor, labels: Tensor) -> None:
    """Add a batch to the summed loss, the count and the confusion counts `true>predicted`."""
    sums["loss"] += float(functional.cross_entropy(logits, labels, reduction="sum"))
    sums["count"] += len(logits)
    for true, predicted in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        key = f"{true}>{predicted}"
        sums[key] = sums.get(key, 0.0) + 1


def summarize(sums: Metrics) -> Metrics:
    """Return loss, accuracy and macro-F1 (mean over the labels that occur, as scikit-learn counts them)."""
    counts = {tuple(map(int, key.split(">"))): n for key, n in sums.items() if ">" in key}
    labels = sorted({label for pair in counts for label in pair})
    scores = []
    for label in labels:
        hit = counts.get((label, label), 0.0)
        either = sum(n * ((true == label) + (predicted == label)) for (true, predicted), n in counts.items())
        scores.append(2 * hit / either)
    right = sum(n for (true, predicted), n in counts.items() if true == predicted)
    total = sums["count"]
    return {
        "loss": sums["loss"] / total,
        "accuracy": right / total,
        "macro_f1": sum(scores) / len(scores),
    }
