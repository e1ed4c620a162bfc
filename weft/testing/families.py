"""Every adapter on every model family and task: does it attach, train in blocks and go through its folder?"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.attach import heads
from weft.adapters.folder import adapter_files, load_adapter
from weft.core.errors import JobError
from weft.core.task import Example, Task
from weft.core.types import Adapter, Tensors
from weft.site import packing, selfcheck
from weft.site.cohort import Cohort, Layout, Mode
from weft.site.model import Base, Loaded, equip, network, peft_config, peft_names
from weft.site.recipe import Recipe
from weft.testing.tiny import END, RECORDS, SIDE, reader

SIZES: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
PICTURE = {"image_size": SIDE, "patch_size": 4, "hidden_act": "gelu"}
TOWER = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
TOWER |= {"initializer_factor": 6.0, "initializer_range": 0.3}
WORDS = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "max_position_embeddings")}
WORDS |= {"eos_token_id": END}
OWN: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 16},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "glm": GROUPED,
    "phi3": {"num_key_value_heads": 1, "original_max_position_embeddings": 128},
    "gemma2": GROUPED
    | {"query_pre_attn_scalar": 8, "sliding_window": 64},  # shorter, its float32 softmax is NaN in float64
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "bloom": {"n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "roberta": {"pad_token_id": 0, "type_vocab_size": 1, "max_position_embeddings": 130},
    "t5": {"d_kv": 8, "d_ff": 24, "num_layers": 2, "decoder_start_token_id": 0, "initializer_factor": 1.0},
    "bart": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "decoder_start_token_id": 2,
        "d_model": 16,
        "init_std": 0.3,
    },
    "gemma3_text": GROUPED
    | {"query_pre_attn_scalar": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "vit": PICTURE,
    "clip": {"text_config": TOWER | WORDS, "vision_config": TOWER | PICTURE, "projection_dim": 12},
}
"""What a family wants beside or instead of SIZES."""
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2", "bloom", "glm", "opt")
ENCODERS = ("bert", "roberta", "distilbert")
ENCODER_DECODERS = ("t5", "bart")
FAMILIES = DECODERS + ENCODERS + ENCODER_DECODERS
FAMILIES_OF = {"image_classification": ("vit",), "image_text": ("clip",)}
"""Task -> the families that it can be tried on; the others take FAMILIES."""
RECIPE = Recipe(
    optimizer="sgd", lr=0.1, batch=2, accumulate=1, epochs=1, steps=None, schedule="constant", warmup=0.0, clip=None,
    weight_decay=0.0, momentum=0.0, moments="reset", checkpointing=False, rounds=1,
)  # fmt: skip
CLASSES = tuple(sorted({record["label"] for record in RECORDS}))


@dataclass(frozen=True)
class Cell:
    """How an adapter does on one family and task."""

    mode: Mode | None
    reason: str = ""
    """Why there is no mode: the error that refuses the job. Why the mode is not the first choice: what differs."""


def config_of(family: str) -> Any:
    """Return the configuration of a tiny model of a family."""
    from transformers import AutoConfig

    own = OWN.get(family, {})
    if family == "clip":  # two configurations in one
        return AutoConfig.for_model(family, **own)
    sizes = {} if family in ("gpt2", "bloom", "distilbert") else SIZES
    words = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_size")}
    if family in ("gpt2", "distilbert"):
        words.pop("hidden_size")
    return AutoConfig.for_model(family, **{**sizes, **words, "initializer_range": 0.3, **own})


@cache
def tiny(family: str, auto: str, reads: tuple[str, ...] = ("text",)) -> nn.Module | str:
    """Return a tiny model of a family for the task's class, or the sentence that refuses it."""
    task = _stub(auto, reads)
    with tempfile.TemporaryDirectory() as folder:
        config_of(family).save_pretrained(Path(folder) / family)
        base = Base(family, Path(folder), random=True)
        try:
            return network(base, task, CLASSES if "Classification" in auto else (), 0, reader(reads))
        except JobError as error:
            return str(error)


def _stub(auto: str, reads: tuple[str, ...]) -> Any:
    return type("Kind", (), {"auto": auto, "reads": reads})


def equipped(adapter: Adapter, task: Task, family: str) -> Loaded:
    """Return a tiny model with an adapter on it, in float64 and away from its start; raise JobError where refused."""
    base = tiny(family, task.auto, task.reads)
    if isinstance(base, str):
        raise JobError(base)
    return equip(copy.deepcopy(base), reader(task.reads), adapter, task, 7)


def cell(adapter: Adapter, task: Task, family: str) -> Cell:
    """Check one adapter on one family and task; raise AssertionError where it is wrong, not where it is refused."""
    try:
        loaded = equipped(adapter, task, family)
    except JobError as error:
        return Cell(None, str(error))
    _check_heads(loaded, task)
    _check_folder(loaded, adapter, task, family)
    return mode_of(double(loaded), task)


def double(loaded: Loaded) -> Loaded:
    """Turn a model into float64, where only a real difference is larger than 1e-9."""
    loaded.net.double()
    loaded.initial = {name: at[0][0]._parameters[at[0][1]] for name, at in loaded.places.items()}  # type: ignore[misc]
    return loaded


def mode_of(loaded: Loaded, task: Task) -> Cell:
    """Return the fastest mode in which two clients in a block have the gradients that each example has alone."""
    cohort = Cohort(loaded, task, RECIPE, 0, "single", loaded.lift)
    encoded = task.encode(loaded.tokenizer, RECORDS[:8], CLASSES if "Classification" in task.auto else ())
    rows = selfcheck._ragged(cohort, loaded.referred(task, encoded.examples, 4))
    params = selfcheck._params(cohort)
    layout = Layout({name: tuple(value.shape[1:]) for name, value in params.items()})
    alone = _alone(cohort, layout, params, rows)
    own = [grad.abs().flatten(1).amax(1) for name, grad in layout.named(alone).items() if not _in_head(name)]
    assert float(torch.stack(own).amax(0).min()) > 1e-6, "a client's gradient is zero: nothing would be trained"
    reasons: list[str] = []
    modes: list[Mode] = ["packed"] if task.pack and packing.supported(loaded.net) else []
    modes.append("padded")
    for mode in modes:
        try:
            got = selfcheck._gradients(replace(cohort, mode=mode), rows, together=True)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            reasons.append(f"{mode}: {str(error).splitlines()[0]}")
            continue
        apart = float((got - alone).abs().max())
        if apart < 1e-7 * max(1.0, float(alone.abs().max())):
            return Cell(mode, "; ".join(reasons))
        reasons.append(f"{mode}: a gradient differs by {apart:.1e}")
    return Cell("single", "; ".join(reasons))


def _alone(cohort: Cohort, layout: Layout, params: Tensors, rows: Sequence[Sequence[Example]]) -> Tensor:
    """Return each client's gradient from the plain model, one example at a time, so that nothing is padded.

    Where a task compares examples, a client's are together.
    """
    flat = layout.flat(params).requires_grad_()
    for k, part in enumerate(rows):
        for group in [part] if cohort.task.least > 1 else [[example] for example in part]:
            cohort.losses(layout.named(flat[k : k + 1]), [group], [0])
    assert flat.grad is not None
    return flat.grad


def _in_head(name: str) -> bool:
    return ".modules_to_save." in name or name.split(".")[0] in ("classifier", "pre_classifier", "score")


def _check_heads(loaded: Loaded, task: Task) -> None:
    """Train every parameter of a classifier's head: it is new, so another machine has another one."""
    if "Classification" not in task.auto:
        return
    net: Any = loaded.net
    inside = net.get_base_model() if hasattr(net, "get_base_model") else net
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    lost = [name for name, p in heads(inside).items() if id(p) not in trained and "original_module" not in name]
    assert not lost, f"of the head, {lost} are not trained"


def _check_folder(loaded: Loaded, adapter: Adapter, task: Task, family: str) -> None:
    """Give the same outputs once the trained adapter went through its folder onto a plain model."""
    first = {name: p.detach().clone() for name, p in loaded.initial.items()}
    moved = moved_by(first, 0.05)
    described = {"adapter": first, "peft_names": peft_names(loaded.net), "peft_config": peft_config(loaded.net, family)}
    with loaded.holding(moved) as net, tempfile.TemporaryDirectory() as folder:
        expected = logits(net, loaded, task)
        for name, content in adapter_files(adapter, moved, described).items():
            (Path(folder) / name).write_bytes(content)
        plain = tiny(family, task.auto, task.reads)
        assert isinstance(plain, nn.Module)
        got = logits(load_adapter(copy.deepcopy(plain), folder).to(loaded.device), loaded, task)
    apart = float((got - expected).abs().max())
    assert apart < 1e-5, f"the outputs differ by {apart:.1e} after the adapter went through its folder"


def moved_by(tensors: Mapping[str, Tensor], size: float) -> Tensors:
    """Return tensors away from where they are, the same way every time."""
    draw = torch.Generator().manual_seed(3)
    return {n: value + size * torch.randn(value.shape, generator=draw).to(value.device) for n, value in tensors.items()}


@torch.no_grad()
def logits(net: Any, loaded: Loaded, task: Task) -> Tensor:
    """Return a model's outputs for one row without padding."""
    ids = torch.tensor([[1, 40, 41, 42, 43, 2]], device=loaded.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if "text" in task.reads else {}
    if "images" in task.reads:
        given["pixel_values"] = loaded.tokenizer.pixels("a picture")[None].to(loaded.device)
    if task.peft_type == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = ids[:, :4]
    found = net(**given)
    result: Tensor = found.logits if hasattr(found, "logits") else torch.cat([found.image_embeds, found.text_embeds])
    return result
