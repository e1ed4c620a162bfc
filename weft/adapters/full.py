"""full: train every parameter of the base; the reference that the small methods are measured against.

McMahan et al. 2016, arXiv:1602.05629, sent whole models. There is no peft model around the base and the trained
tensors have the base's own names. Averaging them averages the weights, which is what FedAvg is defined on.
"""

from typing import Any

from torch import nn

from weft.core.errors import JobError
from weft.core.types import Adapter, Tensors


def full() -> Adapter:
    """Train all parameters, in float32 whatever the base was stored in; every round sends the whole model."""

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        if not all(parameter.is_floating_point() for parameter in base.parameters()):
            raise JobError("adapter: full trains the weights themselves, and these are quantised; take `lora`")
        return base.requires_grad_(True)

    def saved(adapter: Tensors, initial: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        return adapter, config | {"peft_type": "FULL"}

    return Adapter(attach=attach, saved=saved)
