"""Published numbers of trained parameters, on the real shapes, without weights (the meta device)."""

from typing import Any

import pytest
import torch
import transformers

from weft.adapters.ia3 import ia3
from weft.adapters.lora import lora
from weft.adapters.prefix import prefix
from weft.core.types import Adapter

CHATGLM_6B = transformers.BloomConfig(hidden_size=4096, n_layer=28, n_head=32, vocab_size=130528)
"""The linear layers of ChatGLM-6B's blocks: one joint projection 4096 -> 12288 in each of 28."""
LLAMA_7B = transformers.LlamaConfig()
MISTRAL_7B = transformers.MistralConfig()
TINYLLAMA = transformers.LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
)
GPT2 = transformers.GPT2Config()
ROBERTA_BASE = transformers.RobertaConfig(vocab_size=50265)


@pytest.mark.parametrize(
    ("config", "adapter", "count"),
    [
        (CHATGLM_6B, lora(rank=8, targets=["query_key_value"]), 28 * (4096 * 8 + 8 * 12288)),
        (CHATGLM_6B, prefix(tokens=20), 20 * 28 * 2 * 4096),
        (LLAMA_7B, lora(rank=8, targets=["q_proj", "v_proj"]), 4_194_304),
        (MISTRAL_7B, lora(rank=32, targets=["q_proj", "v_proj"]), 13_631_488),
        (TINYLLAMA, lora(rank=16, targets=["q_proj", "v_proj"]), 2_252_800),
        (GPT2, lora(rank=8, targets=["c_attn"]), 294_912),
        (LLAMA_7B, ia3(), 32 * (4096 + 4096 + 11008)),
    ],
    ids=["chatglm-lora", "chatglm-prefix", "llama-7b", "mistral-7b", "tinyllama", "gpt2", "llama-7b-ia3"],
)
def test_published_counts(config: Any, adapter: Adapter, count: int) -> None:
    """ChatGLM-6B: 3,670,016 by LoRA and 4,587,520 by a prefix of 20, as Ianvs' federated tables print them."""
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(config)
    assert _trained(net, adapter, "CAUSAL_LM") == count


def test_roberta_base() -> None:
    """Queries and values at rank 8: 12 layers x 2 x (768 x 8 + 8 x 768) = 294,912; the head comes on top."""
    with torch.device("meta"):
        net = transformers.AutoModelForSequenceClassification.from_config(ROBERTA_BASE)
    head = sum(p.numel() for p in net.classifier.parameters())
    assert _trained(net, lora(rank=8, targets=["query", "value"]), "SEQ_CLS") - head == 294_912


def test_all_linear_layers_of_roberta_base() -> None:
    """Rank 8, 12 layers: four 768 x 768 and two 768 x 3072, 12 x 8 x (4 x 1536 + 2 x 3840) = 1,327,104, head aside."""
    with torch.device("meta"):
        net = transformers.AutoModelForSequenceClassification.from_config(ROBERTA_BASE)
    head = sum(p.numel() for p in net.classifier.parameters())
    assert _trained(net, lora(rank=8, targets="all-linear"), "SEQ_CLS") - head == 1_327_104


def test_all_of_chatglm_6b() -> None:
    """28 x 201,379,840 + 8,192 + 130,528 x 4,096 = 6,173,286,400; LoRA's part of the sum is 0.0594 percent.

    BLOOM's blocks have ChatGLM-6B's shapes, and one layer norm more, behind its embeddings.
    """
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(CHATGLM_6B)
    more = sum(p.numel() for p in net.transformer.word_embeddings_layernorm.parameters())
    total = sum(p.numel() for p in net.parameters()) - more
    assert total == 6_173_286_400
    trained = _trained(net, lora(rank=8, targets=["query_key_value"]), "CAUSAL_LM")
    assert round(100 * trained / (total + trained), 4) == 0.0594


def _trained(net: Any, adapter: Adapter, kind: str) -> int:
    adapted = adapter.attach(net.requires_grad_(False), kind, 0)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)
