"""Quantised bases: the frozen weights in 8 or 4 bits by bitsandbytes, which adapters in float32 are trained beside.

Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8()); Dettmers et al. 2023, arXiv:2305.14314 (QLoRA: nf4, double
quantisation).
"""

import logging
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from weft.core.errors import JobError

HEADS = ["lm_head", "score", "classifier", "pre_classifier", "classification_head"]
"""Output layers stay as they are: those of a classifier are new, and trained."""


def check(random: bool) -> None:
    """Refuse what cannot be quantised here."""
    if random:
        raise JobError("model.quantize: random weights are not worth quantising; leave out model.random or this key")
    if find_spec("bitsandbytes") is None:
        raise JobError(
            "model.quantize: needs bitsandbytes, which is not installed; run pip install 'weft-fl[quantize]' (it has "
            "builds for Linux, Windows and macOS), or leave the key out"
        )


def settle(net: nn.Module) -> None:
    """Keep 4-bit weights as they are stored: evaluation would pack them anew for some processors."""
    module: Any
    for module in net.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def options(bits: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return what from_pretrained must be told; nothing for a base that is not quantised."""
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast", UserWarning)  # said at each layer and step
    how = {"load_in_8bit": True} if bits == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    nested = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype} if bits == "4bit" else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(**how, **nested, llm_int8_skip_modules=HEADS)
    return {"quantization_config": config, "device_map": {"": device}}
