"""The folder of a trained adapter: adapter_config.json and adapter_model.safetensors, as peft writes them.

peft loads it by itself (`PeftModel.from_pretrained(base, folder)`), with three exceptions. `BITFIT` and `FULL` hold
parameters of the base under the base's own names, to be copied over it; `BOTTLENECK` is a tuner that Weft brings.
`load_adapter` reads all of them.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weft.adapters.gate import WEIGHTS, checked
from weft.core.errors import JobError
from weft.core.types import Adapter, Tensors

OWN = ("BITFIT", "FULL")
"""Kinds whose tensors are the base's own parameters."""


def adapter_files(adapter: Adapter, tensors: Tensors, described: Mapping[str, Any]) -> dict[str, bytes]:
    """Return file name -> content for trained tensors, without a model; the same tensors give the same bytes.

    described: what a site says of the adapter: the first `adapter`, its `peft_names` and its `peft_config`.
    """
    from safetensors.torch import save

    held, config = adapter.saved(tensors, described["adapter"], dict(described["peft_config"]))
    names = described["peft_names"]
    filed = {names.get(name, name): tensor for name, tensor in held.items()}
    ordered = {name: filed[name].contiguous() for name in sorted(filed)}
    return {
        "adapter_config.json": json.dumps(dict(sorted(config.items())), indent=1).encode(),
        "adapter_model.safetensors": save(ordered, metadata={"format": "pt"}),
    }


def load_adapter(model: Any, folder: Path | str) -> Any:
    """Put the adapter of a folder on a plain transformers model and return it; the model itself may change."""
    folder = Path(folder)
    kind = checked(folder)["peft_type"]
    if kind in OWN:
        return _copied(model, folder)
    if kind == "BOTTLENECK":
        from weft.adapters import bottleneck_tuner

        bottleneck_tuner.register()
    return _by_peft(model, folder)


def _by_peft(model: Any, folder: Path) -> Any:
    """Load with peft; what it only warns of, tensors that are missing or not expected, is refused."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # a foreign file in a foreign library: whatever it raises is the file's fault
        raise JobError(
            f"{folder} does not fit this model ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]}); "
            "load it on the base that it was trained on"
        ) from None
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            raise JobError(f"{folder} does not fit this model: {' '.join(str(warning.message).split())[:300]}")
    read = {"prompt_embeddings", *get_peft_model_state_dict(loaded, save_embedding_layers=False)}
    if strange := _names(folder) - read:
        raise JobError(f"{folder} does not fit this model: it holds {min(strange)}, which nothing there reads")
    return loaded.eval()


def _names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return set(file.keys())


@torch.no_grad()
def _copied(model: Any, folder: Path) -> Any:
    """Copy a file's tensors over the parameters of the same names, in the model's own dtype."""
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        found = parameters.get(name)
        if found is None or found.shape != tensor.shape:
            have = "no such parameter" if found is None else f"{tuple(found.shape)}"
            raise JobError(f"{folder} does not belong to this model: {name} is {tuple(tensor.shape)}, it has {have}")
        found.copy_(tensor)
    return model.eval()
