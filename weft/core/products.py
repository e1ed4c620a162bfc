"""Products with frozen weights by oneDNN, which torch brings, where the library that torch asks for them is slower.

That is on AMD's processors with AVX-512, for which MKL has no kernels of its own: benchmarks/products.py. The rows of a
product have the same bits there whatever stands beside them, as MKL's have. `torch.backends.mkldnn` switches it off.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST = 1 << 16  # numbers of a weight: with smaller ones a call costs what it saves
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "24", "LRU_CACHE_CAPACITY": "1"}
"""How many products oneDNN keeps the code of, 0.6 MB each, and each thread of torch beside it; every length of a packed
row makes several. Read by them at the first such product."""


def frozen(net: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return for each large frozen linear layer a forward by oneDNN; none where it is not the faster one."""
    layers = (module for module in net.modules() if type(module) is nn.Linear and suits(module.weight))
    return {layer: _forward(layer) for layer in layers}


def suits(weight: Tensor) -> bool:
    """Tell whether products with this weight go by oneDNN."""
    mkldnn = torch.backends.mkldnn
    large = weight.numel() >= LEAST and weight.dtype == torch.float32 and weight.is_cpu
    usable = mkldnn.is_available() and getattr(mkldnn, "enabled", True)  # a user may switch it off
    if not (large and not weight.requires_grad and usable and faster()):
        return False
    for name, kept in KEPT.items():
        os.environ.setdefault(name, kept)
    return True


@cache
def faster() -> bool:
    """Tell whether this processor is one where oneDNN was measured to be faster, and torch has the product."""
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in known and " avx512f " in known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not x.numel():
            return nn.Linear.forward(layer, x)
        return _Product.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]

    return forward


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., in) times the transposed weight (out, in), with the bias (out,) added, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """x times the transposed weight, plus bias; both frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t(), None), None, None
