"""A model from its config alone: every shape, no weight, on torch's meta device or under fake tensors."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from weft.core.errors import JobError
from weft.core.task import Task
from weft.job import Job
from weft.site.model import DTYPES, Base, config_of

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def config(job: Job) -> tuple[Any, list[str]]:
    """Return the base model's configuration, and a note where another family stands for it."""
    base = Base(job.model.name, job.folder, job.model.revision, job.model.dtype, job.model.random)
    file = Path(base.path) / "config.json"
    values = _read(base.name, file) if file.is_file() else {}
    if values.get("model_type") == "chatglm" and "num_layers" in values:
        return _chatglm(values)
    return config_of(base), []


def _read(name: str, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise JobError(f"model.name: the config.json of {name} is not a JSON object; copy the model again")
    return values


def _chatglm(values: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return a Bloom with ChatGLM-6B's layers, for whose own code transformers would need to run the folder's."""
    import transformers

    found = transformers.BloomConfig(
        hidden_size=values["hidden_size"],
        n_layer=values["num_layers"],
        n_head=values["num_attention_heads"],
        vocab_size=values["vocab_size"],
    )
    extra = 2 * values["hidden_size"]
    return found, [
        "ChatGLM's own code is not run: a Bloom with the same linear layers stands for it, with one layer norm more "
        f"({extra:,} parameters)"
    ]


def with_layers(config: Any, layers: int) -> Any:
    """Return the configuration of the same model with fewer layers."""
    less = copy.deepcopy(config)
    text = less.get_text_config()
    name = next(name for name in LAYERS if isinstance(getattr(text, name, None), int))
    setattr(text, name, layers)
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    return less


def layers_of(config: Any) -> int:
    """Return how many layers a configuration has."""
    text = config.get_text_config()
    found = next((getattr(text, name) for name in LAYERS if isinstance(getattr(text, name, None), int)), None)
    if found is None:
        raise JobError(f"model.name: the config.json of a {config.model_type} does not say how many layers there are")
    return int(found)


def skeleton(config: Any, task: Task, classes: int, dtype: str) -> Any:
    """Return the model on the device that is current, frozen."""
    import transformers

    if classes:
        config = copy.deepcopy(config)
        config.num_labels = classes
    config.pad_token_id = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    net = getattr(transformers, task.auto).from_config(config, dtype=DTYPES[dtype])
    return net.requires_grad_(False).eval()


def on_meta(config: Any, task: Task, classes: int, dtype: str) -> Any:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return skeleton(config, task, classes, dtype)
