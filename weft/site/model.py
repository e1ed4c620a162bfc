"""Load the frozen base, put the adapter on it, and read and write its trainable tensors."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import keys
from weft.core.errors import JobError, near
from weft.core.task import Example, Task
from weft.core.types import Adapter, Tensors
from weft.site import quantized
from weft.site.allocator import keep_freed_memory
from weft.site.below import Below, Kept, layers_below
from weft.site.lift import ENCODER, Lift, inserts_tokens, virtual_tokens
from weft.site.processor import FILES, Processor, check_size, image_processor
from weft.site.suited import check_suited

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
    quantize: str | None = None

    @property
    def path(self) -> str:
        """Return the local folder where there is one, else the hub's name."""
        local = (self.folder / Path(self.name).expanduser()).resolve()
        return str(local) if local.is_dir() else self.name


@dataclass
class Loaded:
    """A resident base with one adapter on it; `places` says which modules hold each trainable tensor."""

    net: Any
    tokenizer: Any
    """Or a `Processor`, where records hold pictures."""
    device: torch.device
    places: dict[str, list[tuple[nn.Module, str]]]
    initial: Tensors
    lift: Lift
    below: Below

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

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """Let the model compute what the base does: its adapter off.

        An adapter of the base's own parameters, or one that took its first factors out of them (pissa), cannot be
        off: then with the first adapter, which changes nothing.
        """
        config = self.net.active_peft_config if hasattr(self.net, "get_base_model") else None
        inside = config is None or getattr(config, "init_lora_weights", True) == "pissa"
        with nullcontext() if inside else self.net.disable_adapter():
            yield self.net

    def referred(self, task: Task, examples: Sequence[Example], batch: int) -> Sequence[Example]:
        """Return examples with what the task's loss asks of the base."""
        if task.refer is None:
            return examples
        with self.base() as net:
            return task.refer(net, examples, self.tokenizer.pad_token_id, batch)

    @property
    def words(self) -> Any:
        """Return the tokenizer itself; None where the task reads pictures alone."""
        return self.tokenizer.tokenizer if isinstance(self.tokenizer, Processor) else self.tokenizer

    @property
    def size(self) -> int:
        """Return the number of parameters, the adapter's included."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def fingerprint(self) -> str:
        """Return a SHA-256 over the base's names, shapes and values, the tokenizer's words and the image processor.

        The frozen weights; where the adapter is parameters of the base itself, those as they are loaded.
        """
        digest = hashlib.sha256()
        own = inner_model(self.net) is self.net
        for name, tensor in sorted(self.net.named_parameters()):
            if own or name not in self.places:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        if isinstance(self.tokenizer, Processor):
            digest.update(self.tokenizer.settings().encode())
        return digest.hexdigest()


def check_files(base: Base, reads: Sequence[str] = ("text",)) -> None:
    """Refuse a model folder that cannot be loaded, before anything is."""
    path = Path(base.path)
    if base.quantize:
        quantized.check(base.random)
    if not path.is_dir():
        _check_hub_name(base)
        return
    _check_config(base, path / "config.json")
    if "images" in reads and not any((path / name).is_file() for name in FILES):
        raise JobError(
            f"model.name: {base.name} has no image processor ({FILES[0]}); copy the whole model, or save it with "
            "`AutoImageProcessor`"
        )
    if "text" in reads and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise JobError(f"model.name: {base.name} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...)")
    if not base.random and not list(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin"))
        found = "only pickled weights (.bin); convert them to safetensors" if pickled else "no weights"
        raise JobError(f"model.name: {base.name} has {found}; Weft reads *.safetensors, or set model.random: true")


def _check_hub_name(base: Base) -> None:
    """Refuse what can only be meant as a folder, before the hub is asked for it."""
    path = base.folder / Path(base.name).expanduser()
    beside = "/" in base.name and path.parent.is_dir()
    if path.is_file():
        raise JobError(f"model.name: {base.name} is a file; name the folder that holds config.json and the weights")
    if beside or base.name.startswith((".", "/", "~")) or base.name.count("/") > 1:
        hint = near(path.name, [other.name for other in path.parent.iterdir() if other.is_dir()]) if beside else ""
        raise JobError(f"model.name: there is no folder {base.name}{hint or '; paths count from the job file'}")


def _check_config(base: Base, path: Path) -> None:
    if not path.is_file():
        raise JobError(f"model.name: {base.name} has no config.json; name a folder that save_pretrained wrote")
    try:
        whole = isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        whole = False
    if not whole:
        raise JobError(f"model.name: the config.json of {base.name} is not a JSON object; copy the model again")


def load(
    base: Base,
    adapter: Adapter,
    task: Task,
    classes: tuple[str, ...],
    seed: int,
    *,
    checkpointing: bool = False,
    read: Callable[..., nn.Module] | None = None,
) -> Loaded:
    """Load tokenizer and base, freeze it, attach the adapter; raise JobError with what is wrong in one sentence.

    read: gives the base in place of `network`.
    """
    check_files(base, task.reads)
    check_kind(adapter, task)
    config = config_of(base)
    tokenizer = reader_of(base, task)
    if isinstance(tokenizer, Processor):
        check_size(base.name, tokenizer, config)
    net: Any = (read or network)(base, task, classes, seed, tokenizer)
    if task.reads == ("text",) and net.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise JobError(
            f"model.name: the tokenizer of {base.name} has {len(tokenizer)} tokens and the model only "
            f"{net.get_input_embeddings().weight.shape[0]}; they do not belong together"
        )
    return equip(net, tokenizer, adapter, task, seed, checkpointing=checkpointing)


def equip(net: Any, tokenizer: Any, adapter: Adapter, task: Task, seed: int, *, checkpointing: bool = False) -> Loaded:
    """Freeze a base model and put the adapter on it, trained tensors in float32."""
    check_kind(adapter, task)
    net.requires_grad_(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is being renamed
        adapted: Any = adapter.attach(net, task.peft_type, seed).to(device)
    for name, parameter in adapted.named_parameters():
        if name.rpartition(".")[2] in task.frozen:
            parameter.requires_grad_(False)
    return ready(adapted, tokenizer, device, checkpointing=checkpointing)


def ready(adapted: Any, tokenizer: Any, device: torch.device, *, checkpointing: bool = False) -> Loaded:
    """Make a model with an adapter on it ready to train, trained tensors in float32."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapted.eval()
    if device.type == "cpu":
        keep_freed_memory(sparing=checkpointing)
    if checkpointing:
        _save_memory(adapted)
    places, initial = places_of(adapted)
    _widen(adapted, places)
    below = Below(layers_below(adapted), Kept(sum(parameter.nbytes for parameter in adapted.parameters())))
    return Loaded(adapted, tokenizer, device, places, initial, Lift(adapted, places), below)


def _widen(net: nn.Module, places: dict[str, list[tuple[nn.Module, str]]]) -> None:
    """Let trained linear layers, which are float32, read the activations of a base in half precision."""
    if all(parameter.dtype == torch.float32 for parameter in net.parameters()):
        return
    for module in {module for owners in places.values() for module, _ in owners if type(module) is nn.Linear}:
        module.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))


def _save_memory(net: Any) -> None:
    """Let the backward pass compute activations again instead of keeping them."""
    if virtual_tokens(net) and not inserts_tokens(net):
        raise JobError(
            "local.checkpointing: a prefix reaches the layers as a cache, which checkpointing drops; switch it off"
        )
    inner = inner_model(net)
    old = "gradient_checkpointing_enable"  # its name before transformers 5.20
    getattr(inner, "activation_checkpointing_enable", getattr(inner, old))({"use_reentrant": False})
    inner.enable_input_require_grads()


def inner_model(net: Any) -> Any:
    """Return the transformers model: inside the peft model, or itself where the adapter is its own parameters."""
    return net.get_base_model() if hasattr(net, "get_base_model") else net


def config_of(base: Base, **changes: Any) -> Any:
    """Load the configuration of a base model; from here on transformers speaks through our errors only."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoConfig.from_pretrained(base.path, revision=base.revision or "main", **changes)
    except Exception as error:
        raise JobError(f"model.name: the config.json of {base.name} cannot be used: {_first(error)}") from error


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


def reader_of(base: Base, task: Task) -> Any:
    """Load what reads the records of a task: the tokenizer, or a `Processor` where they hold pictures."""
    words = tokenizer_of(base) if "text" in task.reads else None
    if "images" not in task.reads:
        return words
    return Processor(image_processor(base.name, base.path, base.revision), words)


def check_kind(adapter: Adapter, task: Task) -> None:
    """Refuse an adapter that writes into a text where the model reads pictures."""
    if adapter.virtual and "images" in task.reads:
        raise JobError(
            "adapter: it puts virtual tokens in front of a text, and this task gives the model pictures; "
            "take lora, ia3, bottleneck, bitfit or full"
        )


def network(base: Base, task: Task, classes: tuple[str, ...], seed: int, tokenizer: Any) -> nn.Module:
    """Load the base model with the head that the task needs; random parts come from the public seed."""
    import transformers

    auto = getattr(transformers, task.auto)
    labels = {"num_labels": len(classes)} if classes else {}
    config = config_of(base, **labels)
    if "text" in task.reads:
        config.pad_token_id = tokenizer.pad_token_id
    _without_dropout(config)
    try:
        with torch.random.fork_rng():  # a new head and random weights come from the global generator
            torch.manual_seed(keys.number(seed, "base"))
            if base.random:
                net: nn.Module = auto.from_config(config, dtype=DTYPES[base.dtype])
            else:
                net, loading = auto.from_pretrained(
                    base.path,
                    config=config,
                    revision=base.revision or "main",
                    dtype=DTYPES[base.dtype],
                    use_safetensors=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **quantized.options(base.quantize, DTYPES[base.dtype]),
                )
    except Exception as error:
        raise JobError(f"model.name: {base.name} cannot be loaded as {task.auto}: {_first(error)}") from error
    if not base.random:
        _check_weights(base, net, loading, head=bool(classes))
        quantized.settle(net)
    check_suited(base.name, net, task, tokenizer, classes)
    return net


def _check_weights(base: Base, net: nn.Module, loading: dict[str, Any], head: bool) -> None:
    """Refuse weights that would be drawn at random because the files lack them; only a new head may be."""
    inside = f"{net.base_model_prefix}."
    missing = sorted(name for name in loading["missing_keys"] if not head or name.startswith(inside))
    if missing:
        raise JobError(
            f"model.name: the weights of {base.name} lack {len(missing)} tensors that its config.json asks for, "
            f"such as {missing[0]}; copy the whole model again"
        )
    for name, found, wanted in sorted(loading["mismatched_keys"]):
        if not head or name.startswith(inside):
            raise JobError(
                f"model.name: in the weights of {base.name}, {name} is {tuple(found)}, and config.json asks for "
                f"{tuple(wanted)}; weights and config.json do not belong together"
            )


def _without_dropout(config: Any) -> None:
    """Switch the base's own dropout off: it is frozen, and its draws could not be addressed to a client."""
    for part in (getattr(config, name, None) for name in ("text_config", "vision_config")):
        if part is not None:
            _without_dropout(part)
    for key, value in list(vars(config).items()):
        if ("drop" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)


def _first(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:300]}...").rstrip(".")


def places_of(net: nn.Module) -> tuple[dict[str, list[tuple[nn.Module, str]]], Tensors]:
    """Find every module that holds each trainable tensor, a tied one hangs in several; and the tensors."""
    names = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in sorted(names.values())}
    for module in net.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                places[names[id(parameter)]].append((module, leaf))
    initial: dict[str, Tensor] = {name: places[name][0][0]._parameters[places[name][0][1]] for name in places}  # type: ignore[misc]
    return places, initial


def peft_names(net: Any) -> dict[str, str]:
    """Return trainable name -> the name in the adapter's file, found by identity of the tensors.

    The parts of a prompt encoder are left out: the file holds what they compute (`Adapter.saved`). Where the adapter
    is parameters of the base, the names are the base's own.
    """
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not hasattr(net, "get_base_model"):
        return {name: name for name in trainable}
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(net, save_embedding_layers=False)
    by_address = {tensor.data_ptr(): name for name, tensor in saved.items()}
    direct = {name: p for name, p in trainable.items() if not name.startswith(ENCODER)}
    lost = [name for name, p in direct.items() if p.data_ptr() not in by_address]
    if lost:
        raise JobError(f"adapter: peft's file format does not hold {lost[0]}")
    return {name: by_address[p.data_ptr()] for name, p in direct.items()}


def peft_config(net: Any, base: str) -> dict[str, Any]:
    """Return the adapter's peft configuration with sets in order, so that two runs write the same bytes."""
    own = net.peft_config["default"].to_dict() if hasattr(net, "get_base_model") else {}
    config = own | {"base_model_name_or_path": base, "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else _plain(value) for key, value in sorted(config.items())}


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
