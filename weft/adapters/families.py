"""Which layers of a model family play which part: what a method's targets are where the job names none."""

from dataclasses import dataclass
from typing import Any

from weft.core.errors import JobError


@dataclass(frozen=True)
class Parts:
    """Last names of the linear layers of one family's blocks."""

    key_value: tuple[str, ...]
    """Keys and values; a family with one joint projection has the queries in it too."""
    attention_out: tuple[str, ...]
    feedforward_out: tuple[str, ...]


_LLAMA = Parts(("k_proj", "v_proj"), ("o_proj",), ("down_proj",))
_BERT = Parts(("key", "value"), ("attention.output.dense",), ("output.dense",))
_NEOX = ("query_key_value",)

PARTS = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "glm", "glm4"],
        _LLAMA,
    ),
    "phi3": Parts(("qkv_proj",), ("o_proj",), ("down_proj",)),
    "gpt2": Parts(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_proj",)),
    "gpt_neox": Parts(_NEOX, ("attention.dense",), ("dense_4h_to_h",)),
    "bloom": Parts(_NEOX, ("self_attention.dense",), ("dense_4h_to_h",)),
    "opt": Parts(("k_proj", "v_proj"), ("out_proj",), ("fc2",)),
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    **dict.fromkeys(["t5", "mt5"], Parts(("k", "v"), ("o",), ("wo",))),
    "bart": Parts(("k_proj", "v_proj"), ("out_proj",), ("fc2",)),
    "distilbert": Parts(("k_lin", "v_lin"), ("out_lin",), ("ffn.lin2",)),
    "vit": Parts(("k_proj", "v_proj"), ("o_proj",), ("fc2",)),
    "clip": Parts(("k_proj", "v_proj"), ("out_proj",), ("fc2",)),
}
"""transformers' model_type -> the parts of its blocks."""


def parts(base: Any, at: str) -> Parts:
    """Return the parts of a base model's family; raise JobError, naming the key to set, where it is not known."""
    family = base.config.model_type
    if family not in PARTS:
        raise JobError(f"{at}: Weft does not know the layers of the family {family}; name them there")
    return PARTS[family]
