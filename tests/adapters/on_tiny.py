"""Tiny models with an adapter on them, and the way through the adapter's folder."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.folder import adapter_files, load_adapter
from weft.core.types import Adapter, Tensors
from weft.site.model import peft_config, peft_names
from weft.testing.families import tiny


def plain(family: str, kind: str = "CAUSAL_LM") -> Any:
    """Return a tiny model of a family, frozen."""
    auto = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}[kind]
    made = tiny(family, auto)
    assert isinstance(made, nn.Module)
    return copy.deepcopy(made).requires_grad_(False).eval()


def put_on(adapter: Adapter, family: str = "llama", kind: str = "CAUSAL_LM", seed: int = 7) -> Any:
    """Return a tiny model with an adapter on it."""
    return adapter.attach(plain(family, kind), kind, seed).eval()


def trained(net: nn.Module) -> Tensors:
    """Return copies of the trainable tensors by name."""
    return {name: p.detach().clone() for name, p in sorted(net.named_parameters()) if p.requires_grad}


def described(net: nn.Module) -> dict[str, Any]:
    """Return what a site says of an adapter."""
    return {"adapter": trained(net), "peft_names": peft_names(net), "peft_config": peft_config(net, "base")}


def through_folder(adapter: Adapter, tensors: Tensors, told: dict[str, Any], model: Any) -> Any:
    """Return a plain model with the adapter that went through its folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in adapter_files(adapter, tensors, told).items():
            (Path(folder) / name).write_bytes(content)
        return load_adapter(model, folder)


def outputs(net: Any) -> Tensor:
    """Return a model's outputs for two texts of one length."""
    ids = torch.tensor([[1, 40, 41, 42, 43, 2], [1, 50, 40, 61, 7, 8]])
    with torch.no_grad():
        result: Tensor = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


def moved(net: Any) -> Any:
    """Take a model's trainable tensors away from where they are, in place."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(net.named_parameters()):
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=draw)
    return net
