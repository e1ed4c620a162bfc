"""lora: low-rank adaptation, dW = scale B A beside each target layer (through peft).

Hu et al. 2021, arXiv:2106.09685; rank-stabilised scale alpha/sqrt(rank): Kalajdzievski 2023, arXiv:2312.03732;
weight-decomposed (dora): Liu et al. 2024, arXiv:2402.09353; PiSSA: Meng et al. 2024, arXiv:2404.02948.
Averaging A and B apart is not averaging dW: mean(B) mean(A) differs from mean(B A) unless the clients agree on
one factor. The journal's aggregation error measures it.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from weft.adapters.attach import attached, check_targets, heads, is_headed
from weft.core.errors import JobError
from weft.core.types import Adapter, Products, Tensors

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
A, B = ".lora_A.", ".lora_B."
END = ".default.weight"


def lora(
    rank: Annotated[int, Field(gt=0)] = 8,
    alpha: Annotated[float, Field(gt=0)] = 16.0,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    targets: Literal["auto", "all-linear"] | list[Name] = "auto",
    rslora: bool = False,
    dora: bool = False,
    init: Literal["default", "pissa"] = "default",
) -> Adapter:
    """Train two low-rank factors beside each target layer; the base stays as it is.

    rank: columns of B and rows of A. alpha: the scale is alpha/rank, or alpha/sqrt(rank) with rslora.
    targets: names of layers (their last parts: q_proj, or layers.5.self_attn.q_proj for one alone), or all linear
    layers but the head; `auto`: those that peft names for the model's family, and all where it knows none.
    dora: train the length of each row of W + dW as well. init: `pissa` begins with the largest singular directions
    of each weight, takes them out of the base here and writes a plain adapter of twice the rank for the plain base.
    """
    scale = alpha / (rank**0.5 if rslora else rank)
    if dora and init == "pissa":
        raise JobError("adapter.lora.init: pissa changes the base, whose row lengths dora starts from; take one")

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        from peft import LoraConfig

        found = _of_family(base) if targets == "auto" else targets
        if isinstance(found, list):
            check_targets(base, found, "adapter.lora.targets")
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=found,
            exclude_modules=_new_layers(base, peft_type) if found == "all-linear" else None,
            use_rslora=rslora,
            use_dora=dora,
            init_lora_weights="pissa" if init == "pissa" else True,
            task_type=peft_type,
        )
        model = attached(base, config, seed, "adapter.lora.targets")
        _check_rank(model, rank)
        if init == "pissa":
            _fix_signs(model)
        return model

    def products(tensors: Tensors) -> Products:
        return {
            name.replace(f"{A}default.weight", ""): (tensors[name.replace(A, B)] * scale, factor)
            for name, factor in tensors.items()
            if A in name
        }

    def saved(adapter: Tensors, initial: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        if init == "pissa":
            adapter = _minus(adapter, initial)
            config = config | {"init_lora_weights": True}
        ranks = {_layer(name): len(factor) for name, factor in adapter.items() if A in name}
        return adapter, _with_ranks(config, ranks, scale, rslora)

    def notice(base: Any) -> str | None:
        if targets != "auto" or _of_family(base) != "all-linear":
            return None
        family = base.config.model_type
        return f"peft names no layers for lora in the family {family}, so all linear ones are taken"

    return Adapter(attach=attach, products=None if dora else products, saved=saved, notice=notice)


def _of_family(base: Any) -> Any:
    """Return the targets that peft names for a model's family, else `all-linear`."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as NAMED

    return NAMED.get(base.config.model_type, "all-linear")


def _new_layers(base: Any, peft_type: str) -> list[str] | None:
    """Return the classifier's new linear layers: they are trained whole, so they take no factors.

    peft leaves out the last of them only; DistilBERT and RoBERTa have two.
    """
    if not is_headed(peft_type):
        return None
    new = {name.rpartition(".")[0] for name in heads(base)}
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name in new] or None


def _layer(name: str) -> str:
    """Return a target's path in the base model from the name of its factor."""
    return name.partition(A)[0].removeprefix("base_model.model.")


def _minus(adapter: Tensors, initial: Tensors) -> Tensors:
    """Return B A - B0 A0 as factors [B, -B0] and [A; A0]: what an adapter adds to the base before pissa."""
    result = dict(adapter)
    for name in adapter:
        if A in name:
            other = name.replace(A, B)
            result[name] = torch.cat([adapter[name], initial[name]])
            result[other] = torch.cat([adapter[other], -initial[other]], 1)
    return result


def _with_ranks(config: dict[str, Any], ranks: dict[str, int], scale: float, rslora: bool) -> dict[str, Any]:
    """Say in a configuration the ranks that the factors have, at the same scale: they may have grown."""
    alphas = {layer: scale * (rank**0.5 if rslora else rank) for layer, rank in ranks.items()}
    if set(ranks.values()) <= {config["r"]}:
        return config
    if len(set(ranks.values())) == 1:
        layer = next(iter(ranks))
        return config | {"r": ranks[layer], "lora_alpha": alphas[layer]}
    return config | {"rank_pattern": ranks, "alpha_pattern": alphas}


@torch.no_grad()
def _fix_signs(model: nn.Module) -> None:
    """Make the largest entry of each row of A positive: a singular value decomposition leaves the signs open."""
    for name, factor in model.named_parameters():
        if A in name:
            largest = factor.gather(1, factor.abs().argmax(1, keepdim=True))
            signs = torch.where(largest < 0, -1.0, 1.0).to(factor.dtype)
            factor.mul_(signs)
            model.get_parameter(name.replace(A, B)).mul_(signs.T)


def _check_rank(model: nn.Module, rank: int) -> None:
    for name, parameter in model.named_parameters():
        if A in name or B in name:
            side = parameter.numel() // rank  # A is (rank, in), B is (out, rank)
            if rank > side:
                layer = name.partition(".lora_")[0].removeprefix("base_model.model.")
                raise JobError(f"adapter.lora.rank: {rank} is more than a side of {layer} ({side}); lower it")
