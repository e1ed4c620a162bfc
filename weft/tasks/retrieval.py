"""Retrieval: how often a picture finds its caption, and a caption its picture, among all of a test group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.types import Metrics

AT = (1, 5)
WAYS = ("text_at", "image_at")  # what is found: the caption of a picture, the picture of a caption
CHUNK = 1024  # queries whose similarities are held at once


@dataclass(frozen=True)
class Gallery:
    """Embeddings of length 1, (records, size), and which picture and which caption each record has."""

    pictures: Tensor
    captions: Tensor
    picture: Sequence[str]
    caption: Sequence[str]


def retrieval_sums(gallery: Gallery, scale: float) -> Metrics:
    """Return the summed symmetric cross-entropy and the hits at 1 and 5 of either way, with what they are out of.

    A picture with several captions is one query and one entry, and any of its captions is a hit; so for captions. An
    entry as near as the best hit stands before it: a model that finds all alike finds nothing.
    """
    sums: Metrics = {"count": float(len(gallery.picture)), "loss": _loss(gallery, scale)}
    sides = (gallery.pictures, gallery.picture), (gallery.captions, gallery.caption)
    for way, (asked, found) in zip(WAYS, (sides, sides[::-1]), strict=True):
        ranks = _ranks(asked, found)
        sums[way] = float(len(ranks))
        for k in AT:
            sums[f"{way}_{k}"] = float((ranks < k).sum())
    return sums


def _loss(gallery: Gallery, scale: float) -> float:
    total = 0.0
    for asked, found in ((gallery.pictures, gallery.captions), (gallery.captions, gallery.pictures)):
        for start in range(0, len(asked), CHUNK):
            logs = (scale * asked[start : start + CHUNK] @ found.T).log_softmax(1)
            total -= float(logs.diagonal(offset=start).sum())
    return total / 2


def _ranks(asked: tuple[Tensor, Sequence[str]], found: tuple[Tensor, Sequence[str]]) -> Tensor:
    """Return for each distinct query how many entries that do not belong to it are as near as its best, (queries,)."""
    queries, entries = _distinct(asked[1]), _distinct(found[1])
    rows = {name: row for row, name in enumerate(queries)}
    columns = {name: column for column, name in enumerate(entries)}
    own = torch.tensor([[rows[q], columns[e]] for q, e in zip(asked[1], found[1], strict=True)])
    table, ranks = found[0][list(entries.values())].T, []
    for start in range(0, len(rows), CHUNK):
        chosen = list(queries.values())[start : start + CHUNK]
        near = asked[0][chosen] @ table
        here = own[(own[:, 0] >= start) & (own[:, 0] < start + len(chosen))]
        mine = torch.zeros_like(near, dtype=torch.bool)
        mine[here[:, 0] - start, here[:, 1]] = True
        best = near.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        ranks.append(((near >= best) & ~mine).sum(1))
    return torch.cat(ranks)


def _distinct(names: Sequence[str]) -> dict[str, int]:
    """Return each name with the place where it first stands."""
    return {name: place for place, name in reversed(list(enumerate(names)))}


def retrieval_summary(sums: Metrics) -> Metrics:
    """Return the mean loss, the recalls, and the zero-shot accuracy where it was measured."""
    found = {"loss": sums["loss"] / sums["count"]}
    for way in WAYS:
        found |= {f"{way}_{k}": sums[f"{way}_{k}"] / sums[way] for k in AT}
    return found | ({"accuracy": sums["right"] / sums["count"]} if "right" in sums else {})
