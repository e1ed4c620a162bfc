"""ptuning: embeddings in front of the text, computed by a small trained network (P-Tuning v1).

Liu et al. 2021, arXiv:2103.10385 (through peft). The network, an MLP or an LSTM, is trained, sent and averaged whole;
the mean of networks is not the mean of the prompts that they compute. It cannot be merged into the base.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from weft.adapters.attach import attached, sizes
from weft.core.types import Adapter, Tensors

PLACE = "prompt_encoder.default."
LSTM_LAYERS = 2


def ptuning(
    tokens: Annotated[int, Field(gt=0)] = 20,
    encoder: Literal["mlp", "lstm"] = "mlp",
    hidden: Annotated[int, Field(gt=0)] = 128,
) -> Adapter:
    """Train embeddings of so many virtual tokens and the network that they go through; the folder holds its output.

    encoder: three linear layers, or a two-layer LSTM in both directions with two linear layers. hidden: its units.
    """

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        from peft import PromptEncoderConfig

        config = PromptEncoderConfig(
            num_virtual_tokens=tokens,
            encoder_reparameterization_type=encoder.upper(),
            encoder_hidden_size=hidden,
            encoder_num_layers=LSTM_LAYERS,
            task_type=peft_type,
            **sizes(base),
        )
        return attached(base, config, seed, "adapter.ptuning")

    return Adapter(attach=attach, saved=_saved, mergeable=False, virtual=True)


def _saved(adapter: Tensors, initial: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Return the embeddings that the network computes, (tokens, hidden), which is what peft reads again."""
    held = {name: tensor for name, tensor in adapter.items() if not name.startswith(PLACE)}
    own = {name.removeprefix(PLACE): tensor for name, tensor in adapter.items() if name.startswith(PLACE)}
    with torch.no_grad():
        return held | {"prompt_embeddings": _computed(own)}, config


def _computed(own: Tensors) -> Tensor:
    rows = own["embedding.weight"]
    inner = {name.removeprefix("lstm_head."): tensor for name, tensor in own.items() if name.startswith("lstm_head.")}
    if inner:
        size = inner["weight_hh_l0"].shape[1]
        with torch.device("meta"):  # draws nothing
            lstm = nn.LSTM(rows.shape[1], size, LSTM_LAYERS, bidirectional=True, batch_first=True)
        lstm.load_state_dict(inner, assign=True)
        rows = lstm(rows.unsqueeze(0))[0][0]
    layers = sorted({name.split(".")[1] for name in own if name.startswith("mlp_head.")}, key=int)
    for i, layer in enumerate(layers):
        rows = rows.relu() if i else rows
        rows = functional.linear(rows, own[f"mlp_head.{layer}.weight"], own[f"mlp_head.{layer}.bias"])
    return rows
