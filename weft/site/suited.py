"""Refuse a loaded base that is of another kind than the task needs."""

from typing import Any

import torch
from torch import nn

from weft.core.errors import JobError
from weft.core.task import Task


def check_suited(name: str, net: Any, task: Task, tokenizer: Any, classes: tuple[str, ...]) -> None:
    """Raise JobError where the task could not learn on this model, or would learn something else."""
    if task.auto == "AutoModelForCausalLM":
        _check_causal(name, net)
    if task.reads == ("text", "images"):
        _check_towers(name, net, tokenizer.tokenizer)
    if classes and getattr(net.config, "is_encoder_decoder", False):
        # T5's head asks for one end in each text, BART's too
        raise JobError(f"model.name: {name} is an encoder-decoder; classification needs an encoder or a decoder")


@torch.no_grad()
def _check_causal(name: str, net: nn.Module) -> None:
    """Refuse an encoder: what it says of a token depends on the tokens after it."""
    net.eval()
    logits = net(input_ids=torch.tensor([[0, 0], [0, 1]])).logits[:, 0]
    first, second = logits.float()
    rounding = max(1e-5, 8 * torch.finfo(logits.dtype).eps) * float(first.abs().max())
    if not torch.allclose(first, second, rtol=0, atol=rounding):
        raise JobError(
            f"model.name: {name} is an encoder, which reads the text after a token as well; this task needs a "
            "decoder, such as a Llama or a GPT"
        )


def _check_towers(name: str, net: Any, tokenizer: Any) -> None:
    """Refuse a model without two towers and one scale, and one that looks for a caption's end where there is none."""
    if not all(hasattr(net, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
        kind = net.config.model_type
        raise JobError(
            f"model.name: {name} is a {kind} model; image_text needs a tower for pictures and one for "
            "captions, such as a CLIP has"
        )
    if hasattr(net, "logit_bias"):
        raise JobError(
            f"model.name: {name} is trained pair by pair (SigLIP), and image_text compares the pairs of "
            "a batch; take a CLIP model"
        )
    words, end = net.config.get_text_config(), tokenizer.eos_token_id
    if words.vocab_size < len(tokenizer):
        raise JobError(
            f"model.name: the tokenizer of {name} has {len(tokenizer)} tokens and the model only "
            f"{words.vocab_size}; they do not belong together"
        )
    looks = len(tokenizer) - 1 if words.eos_token_id == 2 else words.eos_token_id  # 2: CLIP's first configurations
    if words.model_type.startswith("clip") and (end != looks or tokenizer("a")["input_ids"][-1] != end):
        raise JobError(
            f"model.name: the model in {name} reads a caption at its end token {looks}, and its tokenizer ends "
            f"captions otherwise; they do not belong together"
        )
