"""causal_lm: which tokens are learned, what is cut, and the loss by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.core.task import Example
from weft.tasks.causal_lm import IGNORE, causal_lm
from weft.testing.tiny import tokenizer

BOS, EOS = 1, 2
JINJA = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WORDS = tokenizer()


def ids(text: str) -> list[int]:
    result: list[int] = WORDS(text, add_special_tokens=False)["input_ids"]
    return result


def encoded(record: dict[str, Any], words: Any = WORDS, **keys: Any) -> Example:
    (example,) = causal_lm(**keys).encode(words, [record], ()).examples
    return example


def learned(example: Example) -> list[int]:
    return [token for token in example["labels"].tolist() if token != IGNORE]


# --- tokens and labels


def test_only_the_answer_and_its_end_are_learned() -> None:
    example = encoded({"prompt": "ab", "completion": "cd"})
    assert example["ids"].tolist() == [*ids("ab"), *ids(" cd"), EOS]
    assert example["labels"].tolist() == [IGNORE, IGNORE, *ids(" cd"), EOS]
    assert example["prompt"] == 2
    assert example["reference"] == "cd"


def test_a_beginning_is_written_where_the_tokenizer_writes_one() -> None:
    example = encoded({"prompt": "ab", "completion": "c"}, tokenizer(bos=True))
    assert example["ids"].tolist() == [BOS, *ids("ab"), *ids(" c"), EOS]
    assert example["labels"].tolist()[:3] == [IGNORE] * 3
    assert example["prompt"] == 3


def test_a_beginning_is_written_once_where_the_template_has_it() -> None:
    words = tokenizer("<s>" + JINJA, bos=True)
    example = encoded({"prompt": "a", "completion": "b"}, words, template="chat")
    assert example["ids"].tolist().count(BOS) == 1
    assert example["ids"][0] == BOS


def test_text_is_learned_from_its_second_token() -> None:
    example = encoded({"text": "abc"})
    assert example["labels"].tolist() == [*ids("abc"), EOS]
    assert example["prompt"] == 0


def test_a_chat_answer_ends_as_the_template_ends_it() -> None:
    example = encoded({"prompt": "a", "completion": "b"}, tokenizer(JINJA))
    assert learned(example) == ids("b;")
    assert example["prompt"] == len("[user]a;[assistant]")
    assert example["reference"] == "b"


def test_every_answer_of_a_dialogue_is_learned_and_the_last_is_generated() -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    example = encoded({"messages": turns}, tokenizer(JINJA))
    assert learned(example) == ids("b;b;")
    assert example["prompt"] == len("[user]a;[assistant]b;[user]a;[assistant]")
    plain = encoded({"messages": turns})
    assert learned(plain) == [*ids(" b"), EOS, *ids(" b"), EOS]


def test_an_end_that_is_also_the_padding_is_learned() -> None:
    words = tokenizer()
    words.pad_token = words.eos_token
    task = causal_lm(template="plain")
    examples = task.encode(words, [{"prompt": "a", "completion": c} for c in ("b", "bcd")], ()).examples
    batch = task.collate([examples], words.pad_token_id)
    assert batch["input_ids"][0].tolist() == [*ids("a b"), EOS, EOS, EOS]
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert batch["targets"].tolist() == [*ids(" b"), EOS, *ids(" bcd"), EOS]
    assert batch["counts"] == [8]


# --- truncation


def cut(prompt: int, answer: int, longest: int, words: Any = WORDS) -> Example:
    """Encode a prompt and an answer of so many tokens, the answer's space and end counted."""
    record = {"prompt": "p" * prompt, "completion": "a" * (answer - 2)}
    return encoded(record, words, max_length=longest)


@pytest.mark.parametrize(
    ("prompt", "answer", "kept", "left"),
    [
        (3, 7, 3, 7),  # all of 10 tokens fit
        (3, 20, 3, 7),  # a short prompt stays whole
        (5, 20, 5, 5),  # half of the room is for the prompt
        (8, 20, 5, 5),  # a longer prompt keeps its last half of the room
        (8, 4, 6, 4),  # and more where the answer is short
        (50, 3, 7, 3),
    ],
)
def test_truncation_by_hand(prompt: int, answer: int, kept: int, left: int) -> None:
    example = cut(prompt, answer, 10)
    assert example["prompt"] == kept
    assert example["ids"].tolist()[:kept] == ids("p") * kept
    assert example["labels"].tolist()[:kept] == [IGNORE] * kept
    assert len(learned(example)) == left
    assert learned(example) == [*ids(" " + "a" * (answer - 2)), EOS][:left]


def test_a_cut_prompt_keeps_its_beginning() -> None:
    example = cut(50, 3, 10, tokenizer(bos=True))
    assert example["ids"].tolist()[:7] == [BOS, *ids("p") * 6]
    assert example["prompt"] == 7
    assert len(example["ids"]) == 10


def test_what_is_cut_and_what_is_dropped_is_counted() -> None:
    records = [
        {"prompt": "ab", "completion": "c"},
        {"prompt": "ab", "completion": "c" * 20},
    ]
    found = causal_lm(max_length=8).encode(WORDS, records, ())
    assert (len(found.examples), found.truncated, found.dropped) == (2, 1, 0)
    alone = causal_lm(max_length=2).encode(WORDS, [{"text": "a"}], ())
    assert (len(alone.examples), alone.truncated, alone.dropped) == (1, 0, 0)


def test_a_record_with_nothing_left_to_learn_is_dropped() -> None:
    words = tokenizer()
    words.eos_token = None
    found = causal_lm().encode(words, [{"text": "a"}, {"text": "ab"}], ())
    assert (len(found.examples), found.dropped) == (1, 1)


# --- the loss


class Fixed(nn.Module):
    """A model whose logits for the next token depend on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **other: Any) -> Any:
        return SimpleNamespace(logits=self.head(nn.functional.one_hot(input_ids, 3).float()))


def fixed() -> Fixed:
    """Give token i after token j the odds 1 where i = 0, and 2 and 5 for the tokens 1 and 2 after token 1."""
    net = Fixed()
    odds = torch.ones(3, 3)
    odds[:, 1] = torch.tensor([1.0, 2.0, 5.0])  # after token 1: 1/8, 2/8, 5/8; after the others 1/3 each
    net.head.weight.data = odds.log()
    return net


def row(tokens: list[int], labels: list[int]) -> Example:
    return {"ids": torch.tensor(tokens), "labels": torch.tensor(labels)}


def test_the_loss_of_two_rows_by_hand() -> None:
    """Row 1: token 2 after 1, -log(5/8), then 0 after 2, -log(1/3). Row 2: token 1 after 1, -log(2/8).
    The third token of row 2 is padding and the first labels have nothing before them.
    """
    task, net = causal_lm(), fixed()
    one, two = row([1, 2, 0], [IGNORE, 2, 0]), row([1, 1], [1, 1])
    expected = [-math.log(5 / 8) - math.log(1 / 3), -math.log(2 / 8)]
    together, count = task.loss(net, task.collate([[one, two]], 0))
    assert together.tolist() == pytest.approx([sum(expected)])
    assert count.tolist() == [3]
    apart, counts = task.loss(net, task.collate([[one], [two]], 0))
    assert apart.tolist() == pytest.approx(expected)
    assert counts.tolist() == [2, 1]


def test_clients_with_unequal_rows() -> None:
    """The filler row of the second client counts nothing."""
    task, net = causal_lm(), fixed()
    one, two = row([1, 2], [IGNORE, 2]), row([1, 1], [IGNORE, 1])
    loss, count = task.loss(net, task.collate([[one, two, one], [two]], 0))
    assert loss.tolist() == pytest.approx([-2 * math.log(5 / 8) - math.log(2 / 8), -math.log(2 / 8)])
    assert count.tolist() == [3, 1]


def test_shorten_leaves_the_first_label() -> None:
    example = row([1, 1, 1, 2, 0], [IGNORE, IGNORE, IGNORE, 2, 0])
    task = causal_lm()
    assert task.shorten(example, 4)["ids"].tolist() == [1, 1, 1, 2]
    assert task.shorten(example, 1)["labels"].tolist() == [IGNORE, IGNORE, IGNORE, 2]
    assert len(example["ids"]) == 5


def test_summary_by_hand() -> None:
    """A loss of 6 over 3 tokens is 2, its perplexity e^2; a hopeless loss does not overflow."""
    found = causal_lm().summarize({"nll": 6.0, "tokens": 3.0, "count": 1.0})
    assert found == {"loss": 2.0, "perplexity": pytest.approx(math.exp(2))}
    assert math.isfinite(causal_lm().summarize({"nll": 1e4, "tokens": 1.0, "count": 1.0})["perplexity"])
