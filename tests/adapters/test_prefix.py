"""prefix: its size, its projection, and what it cannot do."""

import pytest
import torch

from tests.adapters.on_tiny import described, moved, outputs, plain, put_on, through_folder, trained
from weft.adapters.lora import lora
from weft.adapters.prefix import prefix
from weft.adapters.prompt import prompt
from weft.adapters.ptuning import ptuning
from weft.core.errors import JobError
from weft.site.model import equip
from weft.tasks.causal_lm import causal_lm
from weft.testing.tiny import tokenizer


def count(adapter: object, family: str = "llama") -> int:
    return sum(p.numel() for p in trained(put_on(adapter, family)).values())  # type: ignore[arg-type]


def test_keys_and_values_of_every_layer() -> None:
    """3 tokens x 2 layers x keys and values x one head of 8 numbers = 96; GPT-2 has 2 heads of 8: 192."""
    assert count(prefix(tokens=3)) == 96
    assert count(prefix(tokens=3), "gpt2") == 192


def test_the_projection_s_size() -> None:
    """Embeddings 3 x 8, 8 -> 5 -> 32 with biases: 24 + 45 + 192 = 261 (one key-value head: 8 numbers a token)."""
    assert count(prefix(tokens=3, projection=True, hidden=5)) == 3 * 8 + (8 * 5 + 5) + (5 * 32 + 32)


def test_a_projection_is_saved_as_what_it_computes() -> None:
    adapter = prefix(tokens=3, projection=True)
    net = put_on(adapter)
    told = described(net)
    moved(net)
    held, _ = adapter.saved(trained(net), {}, told["peft_config"])
    assert {name: tuple(rows.shape) for name, rows in held.items()} == {"prompt_embeddings": (3, 32)}
    assert torch.allclose(held["prompt_embeddings"], net.get_prompt_embedding_to_save("default"), atol=1e-6)
    assert torch.allclose(outputs(through_folder(adapter, trained(net), told, plain("llama"))), outputs(net), atol=1e-5)


def test_a_width_without_a_projection_is_refused() -> None:
    with pytest.raises(JobError, match=r"set adapter\.prefix\.projection: true"):
        prefix(hidden=8)


def test_a_family_that_takes_no_keys_from_outside() -> None:
    with pytest.raises(JobError, match="takes no keys and values from outside"):
        put_on(prefix(), "distilbert", "SEQ_CLS")


def test_checkpointing_is_refused_for_a_prefix_and_for_nothing_else() -> None:
    for adapter in (lora(), prompt(), ptuning()):
        equip(plain("llama"), tokenizer(), adapter, causal_lm(), 0, checkpointing=True)
    with pytest.raises(JobError, match=r"local\.checkpointing: a prefix reaches the layers as a cache"):
        equip(plain("llama"), tokenizer(), prefix(), causal_lm(), 0, checkpointing=True)
