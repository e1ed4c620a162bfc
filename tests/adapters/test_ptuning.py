"""ptuning: the sizes of its encoders, and that the folder holds what they compute."""

from typing import Any

import pytest
import torch

from tests.adapters.on_tiny import described, moved, outputs, plain, put_on, through_folder, trained
from weft.adapters.ptuning import ptuning


def test_the_mlp_s_size() -> None:
    """3 x 16 embeddings; 16 -> 5 -> 5 -> 16 with biases: 48 + 85 + 30 + 96 = 259."""
    assert sum(p.numel() for p in trained(put_on(ptuning(tokens=3, hidden=5))).values()) == 259


def test_the_lstm_s_size() -> None:
    """4 gates in 2 directions: layer 1 reads 16, layer 2 reads 2 x 5; then 10 -> 10 -> 16; and 3 x 16 embeddings."""
    first, second = (2 * 4 * (5 * wide + 5 * 5 + 2 * 5) for wide in (16, 10))
    total = 48 + first + second + (10 * 10 + 10) + (10 * 16 + 16)
    assert sum(p.numel() for p in trained(put_on(ptuning(tokens=3, encoder="lstm", hidden=5))).values()) == total


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_folder_holds_what_the_encoder_computes(encoder: Any, kind: str) -> None:
    """A file of peft's own loses the encoder; the file here holds its output, as peft computes it."""
    adapter = ptuning(tokens=3, encoder=encoder, hidden=8)
    net = put_on(adapter, "llama", kind)
    told = described(net)
    moved(net)
    state = torch.get_rng_state()
    held, _ = adapter.saved(trained(net), {}, told["peft_config"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(held["prompt_embeddings"], net.get_prompt_embedding_to_save("default"), atol=1e-6)
    assert not any(name.startswith("prompt_encoder") for name in held)
    loaded = through_folder(adapter, trained(net), told, plain("llama", kind))
    assert torch.allclose(outputs(loaded), outputs(net), atol=1e-5)
