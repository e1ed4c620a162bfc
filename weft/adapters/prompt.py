"""prompt: trained embeddings in front of the text, a soft prompt; the base stays as it is.

Lester, Al-Rfou and Constant 2021, arXiv:2104.08691 (through peft). The model is not linear in its input, so the mean
of prompts is not the mean of what they do; clients that start from the same prompt stay comparable. It cannot be
merged into the base.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.adapters.attach import attached, sizes
from weft.core.errors import JobError
from weft.core.types import Adapter, Tensors

PLACE = "prompt_encoder.default.embedding.weight"
"""The trained embeddings, (tokens, hidden)."""


def prompt(
    tokens: Annotated[int, Field(gt=0)] = 20,
    init: Literal["vocabulary", "random"] = "vocabulary",
    init_text: Annotated[str, Field(min_length=1)] | None = None,
) -> Adapter:
    """Train the embeddings of so many virtual tokens.

    init: embeddings of words drawn from the vocabulary, or normal numbers. init_text: begin with the embeddings of
    this text instead, repeated or cut to `tokens`.
    """

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        from peft import PromptTuningConfig

        start = "SAMPLE_VOCAB" if init == "vocabulary" and init_text is None else "RANDOM"
        config = PromptTuningConfig(
            num_virtual_tokens=tokens, prompt_tuning_init=start, task_type=peft_type, **sizes(base)
        )
        net = attached(base, config, seed, "adapter.prompt")
        if init_text is not None:
            with torch.no_grad():
                net.get_parameter(PLACE).copy_(_words(base, init_text, tokens))
        return net

    return Adapter(attach=attach, saved=_saved, mergeable=False, virtual=True)


def _words(base: Any, text: str, tokens: int) -> Tensor:
    """Return the base's embeddings of a text, (tokens, hidden), read with the base's own tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.name_or_path, revision=getattr(base.config, "_commit_hash", None) or "main"
        )
    except Exception:
        raise JobError("adapter.prompt.init_text: the base has no tokenizer beside it to read the text with") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise JobError("adapter.prompt.init_text: the text has no tokens")
    chosen = torch.tensor([ids[i % len(ids)] for i in range(tokens)])
    table = base.get_input_embeddings().weight.detach()
    words: Tensor = table[chosen.to(table.device)].float()
    return words


def _saved(adapter: Tensors, initial: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    held = {name: tensor for name, tensor in adapter.items() if name != PLACE}
    return held | {"prompt_embeddings": adapter[PLACE]}, config
