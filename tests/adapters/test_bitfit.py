"""bitfit: the model's own biases, their folder, and the models that have none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.on_tiny import described, moved, outputs, plain, put_on, trained
from weft.adapters.bitfit import bitfit
from weft.adapters.folder import adapter_files, load_adapter
from weft.core.errors import JobError


def test_every_bias_and_nothing_else() -> None:
    """Two blocks of GPT-2 have a bias in 2 norms and 4 layers each, and there is one norm at the end: 13."""
    names = list(trained(put_on(bitfit(), "gpt2")))
    assert len(names) == 13
    assert all(name.endswith(".bias") for name in names)
    assert "transformer.h.0.attn.c_attn.bias" in names


def test_the_head_of_a_classifier_is_trained_whole() -> None:
    names = [name for name in trained(put_on(bitfit(), "distilbert", "SEQ_CLS")) if not name.startswith("distilbert.")]
    assert names == ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"]


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_llama_has_no_biases(kind: str) -> None:
    with pytest.raises(JobError, match=r"bitfit trains the biases .* LlamaFor\w+ has none; take `ia3`"):
        put_on(bitfit(), "llama", kind)


def test_half_precision_is_refused() -> None:
    with pytest.raises(JobError, match=r"set model\.dtype: float32"):
        bitfit().attach(plain("gpt2").bfloat16(), "CAUSAL_LM", 0)


def test_a_step_moves_biases_only() -> None:
    net, before = put_on(bitfit(), "gpt2"), plain("gpt2").state_dict()
    net(input_ids=torch.tensor([[1, 40, 41]]), labels=torch.tensor([[1, 40, 41]])).loss.backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith(".bias")}


def test_the_folder_is_plain_parameters(tmp_path: Path) -> None:
    """Without Weft: load_state_dict(strict=False) on the plain model gives the same outputs."""
    net = put_on(bitfit(), "gpt2")
    told = described(net)
    moved(net)
    for name, content in adapter_files(bitfit(), trained(net), told).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": "base", "inference_mode": True, "peft_type": "BITFIT"}
    other = plain("gpt2")
    other.load_state_dict(load_file(tmp_path / "adapter_model.safetensors"), strict=False)
    assert torch.equal(outputs(other), outputs(net))
    with pytest.raises(JobError, match="does not belong to this model"):
        load_adapter(plain("opt"), tmp_path)


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"is no adapter: it needs an adapter_config\.json"):
        load_adapter(plain("gpt2"), tmp_path)
