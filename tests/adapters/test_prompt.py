"""prompt: where it begins, what it computes, and generation with it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.on_tiny import described, moved, outputs, plain, put_on, through_folder, trained
from weft.adapters.prefix import prefix
from weft.adapters.prompt import PLACE, prompt
from weft.adapters.ptuning import ptuning
from weft.core.errors import JobError
from weft.core.task import Probe
from weft.core.types import Adapter
from weft.tasks.text_metrics import generate
from weft.testing.tiny import tokenizer

VIRTUAL = [prompt(tokens=3), ptuning(tokens=3, hidden=8), prefix(tokens=3)]


def test_it_begins_with_words_of_the_vocabulary() -> None:
    net = put_on(prompt(tokens=5))
    rows, table = trained(net)[PLACE], net.get_input_embeddings().weight
    assert rows.shape == (5, 16)
    assert all(bool((table == row).all(1).any()) for row in rows)


def test_the_seed_draws_them() -> None:
    one, same, other = (trained(put_on(prompt(), seed=seed))[PLACE] for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_it_is_the_text_s_own_embeddings_in_front(tmp_path: Path) -> None:
    """`ab` repeated to five tokens; the outputs are those of the same tokens written in front of the text."""
    base = plain("llama")
    tokenizer().save_pretrained(tmp_path)
    base.config.save_pretrained(tmp_path)
    base.name_or_path = str(tmp_path)
    a, b = tokenizer()("ab")["input_ids"]
    net = prompt(tokens=5, init_text="ab").attach(base, "CAUSAL_LM", 0).eval()
    ids = torch.tensor([[1, 40, 41]])
    with torch.no_grad():
        written = plain("llama")(input_ids=torch.cat([torch.tensor([[a, b, a, b, a]]), ids], 1)).logits
        assert torch.allclose(net(input_ids=ids).logits, written, atol=1e-5)
    assert str(tmp_path) not in str({**described(net)["peft_config"], "base_model_name_or_path": ""})


def test_a_text_without_a_tokenizer() -> None:
    with pytest.raises(JobError, match=r"adapter\.prompt\.init_text: the base has no tokenizer"):
        put_on(prompt(init_text="be brief"))


@pytest.mark.parametrize("adapter", VIRTUAL, ids=["prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3"])
def test_generation_is_greedy_whatever_stands_beside_it(adapter: Adapter, family: str) -> None:
    """Prompts of unlike length, alone and in one batch, as saved and as trained: the same text, token by token."""
    net = put_on(adapter, family)
    told = described(net)
    moved(net)
    words = tokenizer()
    texts = ["what is rain", "bread", "what is the engine", "an engin"]
    examples = [{"ids": (ids := torch.tensor(words(text)["input_ids"])), "prompt": len(ids)} for text in texts]
    together = generate(Probe(net, words, 4, 5, None), examples)
    assert together == [generate(Probe(net, words, 1, 5, None), [example])[0] for example in examples]
    assert together == [_greedy(net, words, example["ids"]) for example in examples]
    loaded = through_folder(adapter, trained(net), told, plain(family))
    assert together == generate(Probe(loaded, words, 4, 5, None), examples)


def _greedy(net: Any, words: Any, ids: torch.Tensor) -> str:
    """Continue by five whole forward passes."""
    row = ids
    for _ in range(5):
        with torch.no_grad():
            row = torch.cat([row, net(input_ids=row[None]).logits[0, -1:].argmax(1)])
        if int(row[-1]) == words.eos_token_id:
            break
    text: str = words.decode(row[len(ids) :], skip_special_tokens=True)
    return text.strip()


def test_the_folder_holds_the_embeddings_alone() -> None:
    net = moved(put_on(prompt(tokens=3)))
    held, _ = prompt().saved(trained(net), {}, {})
    assert list(held) == ["prompt_embeddings"]
    assert not prompt().mergeable
    assert outputs(net).shape == (2, 3 + 6, 104)
