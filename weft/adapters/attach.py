"""Put a peft configuration on a base model: first tensors from the public seed, peft's complaints in our words."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import keys
from weft.core.errors import JobError

PLAIN = "FEATURE_EXTRACTION"
"""peft's kind of model for whatever is no language model; the adapter's folder names none, as peft's guides do."""


def attached(base: nn.Module, config: Any, seed: int, at: str) -> nn.Module:
    """Return the peft model of a configuration; raise JobError at the key `at` where peft refuses the base.

    peft knows no classifier of pictures: a new head is named to it here. It draws its first tensors from torch's global
    generator, which is left as it was.
    """
    from peft import get_peft_model

    if config.task_type == PLAIN:
        config.task_type = None
        config.modules_to_save = sorted({name.split(".")[0] for name in heads(base)}) or None
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets GPT-2's layout by itself, and says so
        torch.manual_seed(keys.number(seed, "adapter"))
        try:
            model: nn.Module = get_peft_model(base, config)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            text = str(error).splitlines() or [type(error).__name__]
            raise JobError(f"{at}: peft cannot put it on {type(base).__name__}: {text[0][:200]}") from None
    return model


def is_headed(peft_type: str) -> bool:
    """Tell whether a task may put a new head on the base."""
    return peft_type in ("SEQ_CLS", PLAIN)


def heads(base: Any) -> dict[str, Tensor]:
    """Return the parameters above the pretrained part of a classifier: new for every task, so they always travel.

    A model that is the pretrained part itself, such as CLIP, has none.
    """
    inside = f"{base.base_model_prefix}."
    if not hasattr(base, base.base_model_prefix):
        return {}
    return {name: p for name, p in base.named_parameters() if not name.startswith(inside)}


def sizes(base: Any) -> dict[str, int]:
    """Return what peft must know of a model to put virtual tokens in front of its text; it guesses few families."""
    config = base.config.get_text_config()
    return {
        "token_dim": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,  # the encoder reads them; peft would train as many that nothing reads
    }


def check_targets(base: nn.Module, targets: list[str], at: str) -> None:
    """Refuse a target that no layer has: peft passes over it in silence where another one matches."""
    layers = [name for name, module in base.named_modules() if getattr(module, "weight", None) is not None]
    last = sorted({name.rpartition(".")[2] for name in layers})
    lost = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if lost or not targets:
        raise JobError(f"{at}: {lost} match no layer of this model; its layers end in {', '.join(last)}")
