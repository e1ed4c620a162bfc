"""classification: its classes, its loss by hand, its metrics beside scikit-learn's."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from weft.adapters.lora import lora
from weft.core.errors import JobError
from weft.core.task import Example, Probe
from weft.core.types import Metrics
from weft.site.cohort import Cohort
from weft.tasks.classification import classification
from weft.testing.families import CLASSES, RECIPE, double, equipped
from weft.testing.tiny import RECORDS, tokenizer

TASK = classification()


class Fixed(nn.Module):
    """A model that reads the first token and gives class i the odds of its row."""

    def __init__(self, odds: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(odds).log())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids[:, 0]])


def row(label: int, *tokens: int) -> Example:
    return {"ids": torch.tensor(tokens), "label": label}


# --- classes and encoding


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 2, 2], ("2", "10")),
        (["10", "2"], ("2", "10")),
        (["10", "2", "x"], ("10", "2", "x")),
    ],
)
def test_classes_in_order(labels: list[Any], classes: tuple[str, ...]) -> None:
    assert TASK.classes([{"label": label} for label in labels]) == classes


def test_one_class_is_none() -> None:
    with pytest.raises(JobError, match="needs at least two labels"):
        TASK.classes([{"label": 1}, {"label": "1"}])


def test_encoding_cuts_and_counts() -> None:
    records = [{"text": "abcdef", "label": "y"}, {"text": "ab", "label": "x"}]
    found = classification(max_length=4).encode(tokenizer(), records, ("x", "y"))
    assert [example["label"] for example in found.examples] == [1, 0]
    assert [len(example["ids"]) for example in found.examples] == [4, 2]
    assert (found.truncated, found.dropped) == (1, 0)
    assert TASK.encode(tokenizer(), [], ("x", "y")).examples == []


def test_a_label_that_training_did_not_have() -> None:
    with pytest.raises(JobError, match="the label `z`, which no training record has"):
        TASK.encode(tokenizer(), [{"text": "a", "label": "z"}], ("x", "y"))


# --- loss


def test_the_loss_by_hand_whatever_the_padding() -> None:
    """Odds 1 : 3 for token 0 and 1 : 1 for token 1: -log(3/4) for class 1, -log(1/2) for any."""
    net = Fixed([[1.0, 3.0], [1.0, 1.0]])
    rows = [row(1, 0, 5, 5, 5), row(0, 1)]
    total, count = TASK.loss(net, TASK.collate([rows], 0))
    assert total.tolist() == pytest.approx([-math.log(3 / 4) - math.log(1 / 2)])
    assert count.tolist() == [2]


def test_clients_with_unequal_rows() -> None:
    net = Fixed([[1.0, 3.0], [1.0, 1.0]])
    total, count = TASK.loss(net, TASK.collate([[row(1, 0), row(0, 0)], [row(0, 1)]], 0))
    assert total.tolist() == pytest.approx([-math.log(3 / 4) - math.log(1 / 4), -math.log(1 / 2)])
    assert count.tolist() == [2, 1]


# --- metrics


def confusion(true: list[int], predicted: list[int]) -> Metrics:
    sums: Metrics = {"loss": 2.0 * len(true), "count": float(len(true))}
    for pair in zip(true, predicted, strict=True):
        key = f"{pair[0]}>{pair[1]}"
        sums[key] = sums.get(key, 0.0) + 1
    return sums


def test_metrics_by_hand() -> None:
    """True 0 0 1, predicted 0 1 1: accuracy 2/3; F1 of class 0 is 2/3, of class 1 2/3."""
    found = TASK.summarize(confusion([0, 0, 1], [0, 1, 1]))
    assert found == pytest.approx({"loss": 2.0, "accuracy": 2 / 3, "macro_f1": 2 / 3})


@pytest.mark.parametrize("classes", [2, 3, 5, 12])
def test_metrics_are_those_of_scikit_learn(classes: int) -> None:
    """With 12 classes and 20 rows some classes are only true, some only predicted and some neither."""
    draw = torch.Generator().manual_seed(classes)
    for _ in range(25):
        true = torch.randint(0, classes, (20,), generator=draw).tolist()
        predicted = torch.randint(0, classes, (20,), generator=draw).tolist()
        found = TASK.summarize(confusion(true, predicted))
        assert found["accuracy"] == pytest.approx(accuracy_score(true, predicted))
        expected = f1_score(true, predicted, average="macro", zero_division=0)
        assert found["macro_f1"] == pytest.approx(expected)


def test_measure_counts_what_the_model_says() -> None:
    """Token 0 is called class 1, token 1 class 0; batches of 2 do not matter."""
    net = Fixed([[1.0, 3.0], [3.0, 1.0]])
    rows = [row(1, 0), row(0, 0), row(0, 1), row(0, 1), row(1, 1)]
    with torch.no_grad():
        sums = TASK.measure(Probe(net, tokenizer(), 2, 1, None), rows, ("loss",))
    assert sums["loss"] == pytest.approx(-3 * math.log(3 / 4) - 2 * math.log(1 / 4))
    del sums["loss"]
    assert sums == {"count": 5.0, "1>1": 1.0, "0>1": 1.0, "0>0": 2.0, "1>0": 1.0}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "distilbert"])
def test_packed_texts_have_the_scores_of_padded_ones(family: str) -> None:
    """Two clients with texts of unlike length, in float64."""
    task = classification()
    loaded = double(equipped(lora(rank=2), task, family))
    examples = task.encode(loaded.tokenizer, RECORDS, CLASSES).examples
    rows = [examples[:2], examples[5:6]]
    assert len({len(row["ids"]) for part in rows for row in part}) > 1
    cohort = Cohort(loaded, task, RECIPE, 0, "packed", loaded.lift)
    params = {name: value.detach().expand(2, *value.shape).clone() for name, value in loaded.initial.items()}
    packed, counts = cohort.losses({name: value.requires_grad_() for name, value in params.items()}, rows, [0, 0])
    alone = torch.stack([task.loss(loaded.net, task.collate([part], 0))[0][0].detach() for part in rows])
    assert counts.tolist() == [2, 1]
    assert torch.allclose(packed, alone, rtol=1e-9)
    assert not torch.allclose(alone, alone.flip(0), rtol=1e-2)
