"""Load the frozen base, put the adapter on it, and read and write its trainable tensors."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import keys
from weft.core.errors import JobError
from weft.core.types import Adapter, Task, Tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Base:
    """Which base model, as a job names it."""

    name: str
    folder: Path
    revision: str | None = None
    dtype: str = "float32"
    random: bool = False

    @property
    def path(self) -> str:
        """Return the local folder where there is one, else the hub's name."""
        local = (self.folder / Path(self.name).expanduser()).resolve()
        return str(local) if local.is_dir() else self.name


@dataclass
class Loaded:
    """A resident base with one adapter on it; `places` says which modules hold each trainable tensor."""

    net: nn.Module
    tokenizer: Any
    device: torch.device
    places: dict[str, list[tuple[nn.Module, str]]]
    initial: Tensors

    @contextmanager
    def holding(self, tensors: Tensors) -> Iterator[nn.Module]:
        """Let the model compute with these tensors in place of its own trainable ones."""
        self._install(tensors)
        try:
            yield self.net
        finally:
            self._install(self.initial)

    def _install(self, tensors: Tensors) -> None:
        for name, owners in self.places.items():
            for module, leaf in owners:
                module._parameters[leaf] = tensors[name]  # type: ignore[assignment]  # a view keeps its graph

    def fingerprint(self) -> str:
        """Return a SHA-256 over the frozen weights' names, shapes and values and the tokenizer's vocabulary."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.net.named_parameters()):
            if name not in self.places:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()


def check_files(base: Base) -> None:
    """Refuse a model folder that cannot be loaded, before anything is."""
    path = Path(base.path)
    if not path.is_dir():
        if base.name.startswith((".", "/", "~")) or base.name.count("/") > 1:
            raise JobError(f"model.name: there is no folder {base.name} (looked in {base.folder})")
        return
    if not (path / "config.json").is_file():
        raise JobError(f"model.name: {base.name} has no config.json, so it is not a model folder")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise JobError(f"model.name: {base.name} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...)")
    if not base.random and not list(path.glob("*.safetensors")):
        found = "only pickled weights (.bin); convert them with safetensors" if list(path.glob("*.bin")) else "no weights"
        raise JobError(f"model.name: {base.name} has {found}; Weft reads *.safetensors, or set model.random: true")


def load(base: Base, adapter: Adapter, task: Task, classes: tuple[str, ...], seed: int) -> Loaded:
    """Load tokenizer and base, freeze it, attach the adapter; raise JobError with what is wrong in one sentence."""
    check_files(base)
    tokenizer = tokenizer_of(base)
    net = network(base, task, classes, seed, tokenizer)
    net.requires_grad_(False)
    if net.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise JobError(
            f"model.name: the tokenizer of {base.name} has {len(tokenizer)} tokens and the model only "
            f"{net.get_input_embeddings().weight.shape[0]}; they do not belong together"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is being renamed
        net = adapter.attach(net, task.peft_type, seed).to(device)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Loaded(net, tokenizer, device, *_places(net))


def tokenizer_of(base: Base) -> Any:
    """Load the tokenizer; one without a pad token pads with its end token, which masks and not ids hide."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, revision=base.revision or "main")
    except Exception as error:
        raise JobError(f"model.name: the tokenizer of {base.name} cannot be read: {_first(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def network(base: Base, task: Task, classes: tuple[str, ...], seed: int, tokenizer: Any) -> nn.Module:
    """Load the base model with the head that the task needs; random parts come from the public seed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = getattr(transformers, task.auto)
    labels = {"num_labels": len(classes)} if classes else {}
    try:
        config = transformers.AutoConfig.from_pretrained(base.path, revision=base.revision or "main", **labels)
        config.pad_token_id = tokenizer.pad_token_id
        with torch.random.fork_rng():  # a new head and random weights come from the global generator
            torch.manual_seed(keys.number(seed, "base"))
            if base.random:
                net: nn.Module = auto.from_config(config, dtype=DTYPES[base.dtype])
            else:
                net = auto.from_pretrained(
                    base.path,
                    config=config,
                    revision=base.revision or "main",
                    dtype=DTYPES[base.dtype],
                    use_safetensors=True,
                    trust_remote_code=False,
                )
    except Exception as error:
        raise JobError(f"model.name: {base.name} cannot be loaded as {task.auto}: {_first(error)}") from error
    return net


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def _places(net: nn.Module) -> tuple[dict[str, list[tuple[nn.Module, str]]], Tensors]:
    """Find every module that holds each trainable tensor: a tied one hangs in several."""
    names = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in sorted(names.values())}
    for module in net.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                places[names[id(parameter)]].append((module, leaf))
    initial: dict[str, Tensor] = {name: places[name][0][0]._parameters[places[name][0][1]] for name in places}  # type: ignore[misc]
    return places, initial


def peft_names(net: nn.Module) -> dict[str, str]:
    """Return trainable name -> the name in peft's own adapter file, found by identity of the tensors."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(net, save_embedding_layers=False)  # type: ignore[arg-type]
    by_address = {tensor.data_ptr(): name for name, tensor in saved.items()}
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    lost = [name for name, p in trainable.items() if p.data_ptr() not in by_address]
    if lost:
        raise JobError(f"adapter: peft's file format does not hold {lost[0]}")
    return {name: by_address[p.data_ptr()] for name, p in trainable.items()}


def peft_config(net: nn.Module, base: str) -> dict[str, Any]:
    """Return the adapter's peft configuration with sets in order, so that two runs write the same bytes."""
    config = net.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}  # type: ignore[index,operator]
    return {key: sorted(value) if isinstance(value, set) else _plain(value) for key, value in sorted(config.items())}


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
