"""full: every parameter, tied ones once, in float32."""

import copy

import pytest
import torch
from torch import nn

from tests.adapters.on_tiny import described, moved, outputs, plain, put_on, through_folder, trained
from weft.adapters.full import full
from weft.core.errors import JobError
from weft.site.model import equip
from weft.tasks.causal_lm import causal_lm
from weft.testing.tiny import tokenizer


def test_every_parameter_and_tied_ones_once() -> None:
    """GPT-2's output layer is its embedding: one name, two modules that read it."""
    loaded = equip(plain("gpt2"), tokenizer(), full(), causal_lm(), 0)
    assert set(loaded.places) == {name for name, _ in plain("gpt2").named_parameters()}
    assert [type(module).__name__ for module, _ in loaded.places["transformer.wte.weight"]] == ["Embedding", "Linear"]


def test_half_precision_is_trained_in_float32() -> None:
    loaded = equip(plain("llama").bfloat16(), tokenizer(), full(), causal_lm(), 0)
    assert {p.dtype for p in loaded.net.parameters()} == {torch.float32}
    assert torch.isfinite(outputs(loaded.net)).all()


def test_the_folder_of_a_tied_model() -> None:
    net = put_on(full(), "gpt2")
    told = described(net)
    moved(net)
    other = through_folder(full(), trained(net), told, plain("gpt2"))
    assert torch.equal(outputs(other), outputs(net))
    assert other.lm_head.weight is other.transformer.wte.weight


def test_the_fingerprint_is_that_of_the_base_as_loaded() -> None:
    """Nothing is frozen, and still another base has another fingerprint; training does not change it."""
    net = plain("llama")
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.model.norm.weight += 1
    prints = [equip(model, tokenizer(), full(), causal_lm(), 0) for model in (net, other)]
    before = prints[0].fingerprint()
    assert before != prints[1].fingerprint()
    with prints[0].holding({name: torch.zeros_like(p) for name, p in prints[0].initial.items()}):
        pass
    assert prints[0].fingerprint() == before


def test_quantised_weights_are_refused() -> None:
    net = plain("llama")
    net.lm_head.weight = nn.Parameter(torch.zeros(104, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(JobError, match="these are quantised; take `lora`"):
        full().attach(net, "CAUSAL_LM", 0)
