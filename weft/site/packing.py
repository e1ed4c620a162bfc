"""Attention for packed blocks: the tokens of all examples stand in one row, each example attends to itself alone.

It goes in through transformers' public attention interface; a model that does not ask the interface, or asks for
what this function does not do (a sliding window, soft-capped scores), is never packed.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.site.lanes import Lanes
from weft.site.lift import virtual_tokens

NAME = "weft_packed"


class _Now(threading.local):
    """The block in training, of each thread: transformers calls the function with tensors only."""

    lanes: Lanes


_NOW = _Now()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attend within each example; query (1, heads, tokens, size), out (1, tokens, heads, size)."""
    refused = [name for name in ("sliding_window", "softcap", "s_aux") if other.get(name) is not None]
    if refused or attention_mask is not None or dropout:
        raise NotImplementedError(f"packed attention does not do {', '.join(refused) or 'masks or dropout'}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    grouped, lengths = query.shape[1] != key.shape[1], _NOW.lanes.lengths
    attend = partial(functional.scaled_dot_product_attention, scale=scaling, is_causal=causal, enable_gqa=grouped)
    if len(set(lengths)) == 1:  # then the row is a batch
        rows = (x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value))
        out = attend(*rows)  # (examples, heads, tokens, size)
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), None
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part).transpose(1, 2) for part in parts], 1), None


def supported(net: Any) -> bool:
    """Tell whether a model asks transformers' attention interface at all, and has no virtual tokens to attend to."""
    base = net.get_base_model() if hasattr(net, "get_base_model") else net
    config = base.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    asks = bool(getattr(base, "_supports_attention_backend", False))
    return asks and window is None and not virtual_tokens(net)


@contextmanager
def packed(net: Any, lanes: Lanes) -> Iterator[None]:
    """Let the model's attention keep the examples of a packed row apart."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    config = net.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    _NOW.lanes = lanes
    try:
        yield
    finally:
        config._attn_implementation = before
