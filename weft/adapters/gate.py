"""The gate for adapter folders: what peft would follow, guess at or overlook is refused before peft sees it.

From a folder only adapter_config.json and adapter_model.safetensors are read, both bounded in size; names of modules
are names and no patterns (a pattern can run for ever on one module name), numbers are finite, tensors as well.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from weft.core.errors import JobError

MOST_CONFIG = 1_000_000  # bytes
WEIGHTS = "adapter_model.safetensors"
NAMES = ("target_modules", "modules_to_save", "exclude_modules", "feedforward_modules", "layers_to_transform")
"""Fields that name modules, which peft reads as patterns where they are text."""
PATTERNS = ("rank_pattern", "alpha_pattern")
"""Fields whose keys peft reads as patterns."""
_PLAIN = re.compile(r"[\w.-]{1,300}")


def checked(folder: Path) -> dict[str, Any]:
    """Return the config of an adapter folder; raise JobError for one that must not be loaded."""
    config = _config(folder)
    for path, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise JobError(f"{folder}/adapter_config.json: {path} is not a finite number")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        if name in config and value is not None and not (whole and 0 < value <= 65536):
            raise JobError(f"{folder}/adapter_config.json: {name} must be a number from 1 to 65536")
    _check_names(folder, config)
    _check_weights(folder)
    return config


def _config(folder: Path) -> dict[str, Any]:
    try:
        with open(folder / "adapter_config.json", "rb") as file:
            content = file.read(MOST_CONFIG + 1)
        config = json.loads(content) if len(content) <= MOST_CONFIG else None
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise JobError(f"{folder} is no adapter: it needs an adapter_config.json that names its peft_type")
    return config


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return path and value of everything in a tree that is not a dict or a list."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, f"{path}[{i}]")]
    return [(path, value)]


def _check_names(folder: Path, config: dict[str, Any]) -> None:
    for field in NAMES:
        value = config.get(field)
        names = value if isinstance(value, list) else [value]
        if value is not None and not all(
            isinstance(name, int) or (isinstance(name, str) and _PLAIN.fullmatch(name)) for name in names
        ):
            raise JobError(f"{folder}/adapter_config.json: {field} must be names of modules, not patterns; list them")
    for field in PATTERNS:
        value = config.get(field)
        if value is not None and not (isinstance(value, dict) and all(_PLAIN.fullmatch(key) for key in value)):
            raise JobError(f"{folder}/adapter_config.json: {field} must map names of modules to numbers")


def _check_weights(folder: Path) -> None:
    """Refuse weights that are missing, damaged, no floating numbers, or not finite."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise JobError(f"{folder} has no {WEIGHTS}; other formats can run code when they are read and are refused")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a dict)
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
                    raise JobError(f"{path}: {name} must hold finite floating-point numbers")
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise JobError(f"{path} is damaged ({str(error).splitlines()[0]}); fetch it again") from None
