"""bitfit: train the model's own bias terms, and nothing else.

Ben Zaken, Ravfogel and Goldberg 2021, arXiv:2106.10199. The biases are parameters of the base, so there is no peft
model around it and the trained tensors have the base's own names. A bias is added, so the mean of biases is the mean
of what the clients' layers add: averaging is exact layer by layer.
"""

from typing import Any

import torch
from torch import nn

from weft.adapters.attach import heads, is_headed
from weft.core.errors import JobError
from weft.core.types import Adapter, Tensors


def bitfit() -> Adapter:
    """Train every bias of the base; it must have some: GPT-2, BLOOM, OPT, BERT do, LLaMA does not."""

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        head = heads(base) if is_headed(peft_type) else {}
        own = {name: p for name, p in base.named_parameters() if name not in head and name.endswith("bias")}
        if not own:
            raise JobError(
                f"adapter: bitfit trains the biases that a model has, and {type(base).__name__} has none; "
                "take `ia3`, which is as small, or `lora`"
            )
        wide = {p.dtype for p in own.values()} - {torch.float32, torch.float64}
        if wide:
            raise JobError("adapter: bitfit trains the base's own biases in float32; set model.dtype: float32")
        for parameter in [*own.values(), *head.values()]:
            parameter.requires_grad_(True)
        return base

    def saved(adapter: Tensors, initial: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        return adapter, config | {"peft_type": "BITFIT"}

    return Adapter(attach=attach, saved=saved)
