"""prefix: trained keys and values in front of the text, in every layer (P-Tuning v2, prefix tuning).

Li and Liang 2021, arXiv:2101.00190 (with a projection); Liu et al. 2021, arXiv:2110.07602 (without) (through peft).
Attention weighs the prefix by a softmax, so the mean of prefixes is not the mean of what they do; with a projection
the mean of two networks is not even the mean of their prefixes. It cannot be merged into the base.
"""

from typing import Annotated, Any

from pydantic import Field
from torch import nn
from torch.nn import functional

from weft.adapters.attach import attached
from weft.core.errors import JobError
from weft.core.types import Adapter, Tensors

PLACE = "prompt_encoder.default."


def prefix(
    tokens: Annotated[int, Field(gt=0)] = 20,
    projection: bool = False,
    hidden: Annotated[int, Field(gt=0)] | None = None,
) -> Adapter:
    """Train so many virtual tokens' keys and values of every layer: 2 x layers x width numbers a token.

    projection: compute them by a two-layer network from smaller embeddings, which is trained and sent whole; the
    folder holds what it computes. hidden: units of that network; without it the model's width.
    """
    if hidden is not None and not projection:
        raise JobError("adapter.prefix.hidden: is the width of the projection; set adapter.prefix.projection: true")

    def attach(base: Any, peft_type: str, seed: int) -> nn.Module:
        from peft import PrefixTuningConfig

        _check(base)
        width = hidden or base.config.hidden_size
        config = PrefixTuningConfig(
            num_virtual_tokens=tokens, prefix_projection=projection, encoder_hidden_size=width, task_type=peft_type
        )
        return attached(base, config, seed, "adapter.prefix")

    return Adapter(attach=attach, saved=_saved, mergeable=False, virtual=True)


def _check(base: Any) -> None:
    """Refuse a family that cannot take keys and values from outside."""
    import inspect

    inner = base.get_decoder() if base.config.is_encoder_decoder else getattr(base, base.base_model_prefix)
    if "past_key_values" not in inspect.signature(inner.forward).parameters:
        raise JobError(
            f"adapter: {type(base).__name__} takes no keys and values from outside, so it can have no prefix; "
            "take `ia3` or `lora`"
        )


def _saved(adapter: Tensors, initial: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Return the prefix itself, (tokens, 2 x layers x width), which is what peft reads again."""
    held = {name: tensor for name, tensor in adapter.items() if not name.startswith(PLACE)}
    own = {name.removeprefix(PLACE): tensor for name, tensor in adapter.items() if name.startswith(PLACE)}
    rows = own["embedding.weight"]
    if config["prefix_projection"]:
        inner = functional.linear(rows, own["transform.0.weight"], own["transform.0.bias"]).tanh()
        rows = functional.linear(inner, own["transform.2.weight"], own["transform.2.bias"])
    return held | {"prompt_embeddings": rows}, config
