"""lora: low-rank adaptation, dW = scale B A beside each target layer (through peft).

Hu et al. 2021, arXiv:2106.09685; rank-stabilised scale alpha/sqrt(rank): Kalajdzievski 2023, arXiv:2312.03732.
Averaging A and B apart is not averaging dW: mean(B) mean(A) differs from mean(B A) unless the clients agree on
one factor. The journal's aggregation error measures it.
"""

import warnings
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from weft.core import keys
from weft.core.errors import JobError
from weft.core.types import Adapter, Products, Tensors

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]


def lora(
    rank: Annotated[int, Field(gt=0)] = 8,
    alpha: Annotated[float, Field(gt=0)] = 16.0,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    targets: Literal["all-linear"] | list[Name] = "all-linear",
    rslora: bool = False,
) -> Adapter:
    """Train two low-rank factors beside each target layer; the base stays as it is.

    rank: columns of B and rows of A. alpha: the scale is alpha/rank, or alpha/sqrt(rank) with rslora.
    targets: names of layers (their last parts, such as q_proj), or all linear layers but the head.
    """
    scale = alpha / (rank**0.5 if rslora else rank)

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        if targets != "all-linear":
            _check_targets(base, targets)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets,
            use_rslora=rslora,
            task_type=peft_type,
        )
        with torch.random.fork_rng(), warnings.catch_warnings():  # peft draws A from the global generator
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # it sets GPT-2's layout by itself, and says so
            torch.manual_seed(keys.number(seed, "adapter"))
            try:
                model: nn.Module = get_peft_model(base, config)
            except ValueError as error:
                raise JobError(f"adapter.lora.targets: {str(error).splitlines()[0]}") from None
        _check_rank(model, rank)
        return model

    def products(tensors: Tensors) -> Products:
        return {
            name.replace(".lora_A.default.weight", ""): (
                tensors[name.replace(".lora_A.", ".lora_B.")] * scale,
                factor,
            )
            for name, factor in tensors.items()
            if ".lora_A." in name
        }

    return Adapter(attach=attach, products=products)


def _check_targets(base: nn.Module, targets: list[Name]) -> None:
    """Refuse a target that no layer has: peft passes over it in silence where another one matches."""
    layers = [name for name, module in base.named_modules() if getattr(module, "weight", None) is not None]
    last = sorted({name.rpartition(".")[2] for name in layers})
    lost = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if lost or not targets:
        raise JobError(
            f"adapter.lora.targets: {lost} match no layer of this model; its layers end in {', '.join(last)}"
        )


def _check_rank(model: nn.Module, rank: int) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            side = parameter.numel() // rank  # A is (rank, in), B is (out, rank)
            if rank > side:
                layer = name.partition(".lora_")[0].removeprefix("base_model.model.")
                raise JobError(f"adapter.lora.rank: {rank} is more than a side of {layer} ({side}); lower it")
