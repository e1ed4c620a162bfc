"""image_text: InfoNCE by hand and within one client, recalls by hand, zero-shot accuracy, what it refuses."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.core.errors import JobError
from weft.core.task import Example, Probe
from weft.tasks.image_text import image_text
from weft.tasks.retrieval import Gallery, retrieval_summary, retrieval_sums
from weft.testing.families import tiny
from weft.testing.tiny import RECORDS, reader

TASK = image_text(max_length=40)


class Towers(nn.Module):
    """Two towers that read embeddings off a table: of a picture's first pixel, of a caption's first token."""

    def __init__(self, pictures: list[list[float]], captions: list[list[float]], scale: float = 1.0) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())
        self.pictures, self.captions = torch.tensor(pictures), torch.tensor(captions)
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))

    def get_image_features(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(pooler_output=self.pictures[pixel_values[:, 0, 0, 0].long()])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(pooler_output=self.captions[input_ids[:, 0]])


def row(picture: int, caption: int) -> Example:
    pixels = torch.full((3, 2, 2), float(picture))
    return {"pixels": pixels, "ids": torch.tensor([caption]), "picture": f"{picture}.png", "caption": f"{caption}"}


ACROSS = [[3.0, 0.0], [0.0, 0.5]]  # at a right angle; lengths do not count


def test_the_loss_by_hand() -> None:
    """Scale 2, own similarity 1, the other 0: -log(e^2 / (e^2 + 1)) for each picture and each caption, halved twice."""
    net = Towers(ACROSS, ACROSS, scale=2.0)
    total, count = TASK.loss(net, TASK.collate([[row(0, 0), row(1, 1)]], 0))
    each = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert total.tolist() == pytest.approx([2 * each])
    assert count.tolist() == [2]


def test_a_client_is_told_from_its_own_rows_only() -> None:
    """The second client's pictures are the first's, and a third row would be a negative: neither changes a thing."""
    net = Towers(ACROSS, ACROSS, scale=2.0)
    rows = [[row(0, 0), row(1, 1)], [row(0, 0)], [row(0, 1), row(0, 0), row(1, 1)], []]
    total, count = TASK.loss(net, TASK.collate(rows, 0))
    alone = [float(TASK.loss(net, TASK.collate([part], 0))[0]) for part in rows[:3]]
    assert total.tolist() == pytest.approx([*alone, 0.0])
    assert total[1] == 0.0  # nothing to be told from
    assert count.tolist() == [2, 1, 3, 0]


def test_the_loss_and_the_gradient_are_those_of_transformers() -> None:
    """CLIPModel's own loss is the mean of both sides over the batch."""
    net: Any = tiny("clip", "AutoModel", TASK.reads)
    rows = TASK.encode(reader(TASK.reads), RECORDS[:5], ()).examples
    batch = TASK.collate([rows], 0)
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    found = []
    for loss in (lambda: TASK.loss(net, batch)[0].sum() / 5, lambda: net(**own, return_loss=True).loss):
        net.requires_grad_(True)
        value = loss()
        value.backward()
        found.append((value.detach(), net.visual_projection.weight.grad.clone()))
        net.zero_grad(set_to_none=True)
    net.requires_grad_(False)
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_a_caption_keeps_its_end() -> None:
    example = TASK.encode(reader(TASK.reads), RECORDS[:1], ()).examples[0]
    for longest in (1, 2, 7):
        short = TASK.shorten(example, longest)
        assert len(short["ids"]) == longest
        assert short["ids"][-1] == example["ids"][-1]
    cut = image_text(max_length=5).encode(reader(TASK.reads), RECORDS[:2], ())
    assert cut.truncated == 2
    assert [row["ids"][-1] for row in cut.examples] == [100, 100]


# --- recall


def gallery(near: list[list[float]], picture: list[str], caption: list[str]) -> Gallery:
    """Return a gallery whose similarities are these, (records, records)."""
    return Gallery(torch.tensor(near), torch.eye(len(near)), picture, caption)


def test_recall_by_hand() -> None:
    """Rows are pictures a, b, c, columns captions x, y, z, one for each.

    a finds x first (0.9 before 0.5 and 0.1); b finds y second (z stands before), c finds z third. x finds a first
    (0.9 before 0.7 and 0.3); y finds b third (0.4 after 0.6 and 0.5), z finds c second (0.2 after 0.8).
    """
    near = [[0.9, 0.5, 0.1], [0.3, 0.4, 0.8], [0.7, 0.6, 0.2]]
    sums = retrieval_sums(gallery(near, ["a", "b", "c"], ["x", "y", "z"]), 1.0)
    assert (sums["text_at_1"], sums["text_at_5"], sums["text_at"]) == (1, 3, 3)
    assert sums["image_at_1"] == 1
    expected = sum(
        functional.cross_entropy(side, torch.arange(3), reduction="sum")
        for side in (torch.tensor(near), torch.tensor(near).T)
    )
    assert sums["loss"] == pytest.approx(float(expected) / 2)
    found = retrieval_summary(sums)
    assert found["text_at_1"] == pytest.approx(1 / 3)


def test_a_model_that_finds_all_alike_finds_nothing() -> None:
    sums = retrieval_sums(gallery([[1.0] * 8] * 8, list("abcdefgh"), list("stuvwxyz")), 1.0)
    assert [value for name, value in sums.items() if name.endswith(("_1", "_5"))] == [0, 0, 0, 0]
    assert sums["loss"] / 8 == pytest.approx(math.log(8))


def test_several_captions_of_a_picture_are_one_query() -> None:
    """Picture a with captions x and y, b with z: two pictures, three captions; y is a hit for a as x is."""
    near = [[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.2, 0.3, 0.4]]
    sums = retrieval_sums(gallery(near, ["a", "a", "b"], ["x", "y", "z"]), 1.0)
    assert (sums["text_at"], sums["image_at"]) == (2, 3)
    assert sums["text_at_1"] == 2
    assert sums["image_at_1"] == 1  # y finds a; x and z find the other


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    some = gallery(torch.randn(9, 9, generator=draw).tolist(), list("aabcdefgh"), list("rstuvwxyz"))
    whole = retrieval_sums(some, 3.0)
    monkeypatch.setattr("weft.tasks.retrieval.CHUNK", 4)
    assert retrieval_sums(some, 3.0) == pytest.approx(whole)


def test_zero_shot_accuracy() -> None:
    """Captions "a" and "b" name the classes; a picture is called what it is nearer to: right for two of three."""
    task = image_text(classes=("a", "b"), prompt="{}", max_length=40)
    words = SimpleNamespace(tokenizer=lambda text, **how: {"input_ids": ["ab".index(text)]}, pad_token_id=0)
    net = Towers([[1.0, 0.1], [0.1, 1.0], [1.0, 0.2]], ACROSS)
    rows = [row(i, 0) | {"label": label} for i, label in enumerate((0, 1, 1))]
    with torch.no_grad():
        sums = task.measure(Probe(net, words, 2, 1, None), rows, task.metrics)
    assert sums["right"] == 2
    assert task.summarize(sums)["accuracy"] == pytest.approx(2 / 3)
    assert "accuracy" not in TASK.metrics


def test_labels_and_classes_must_agree() -> None:
    task = image_text(classes=("card", "rain"))
    with pytest.raises(JobError, match="has a label that is not among them"):
        task.encode(reader(task.reads), RECORDS, ())
    with pytest.raises(JobError, match="two or more, each once"):
        image_text(classes=("a", "a"))
