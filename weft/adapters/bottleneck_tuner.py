"""The bottleneck network as a tuner of peft: its state, file format and switches then are peft's own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}


def register() -> None:
    """Make the tuner known to peft; its enumeration of methods is closed, so a member is put into it."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if _KIND not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)


def _member(name: str) -> PeftType:
    known: Any = PeftType
    if name not in known.__members__:
        member: Any = str.__new__(known, name)
        member._name_ = member._value_ = name
        known._member_map_[name] = known._value2member_map_[name] = member
        known._member_names_.append(name)
        type.__setattr__(known, name, member)
    kind: PeftType = known[name]
    return kind


_KIND = _member("BOTTLENECK")


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """What adapter_config.json says of a bottleneck adapter."""

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None
    size: int = field(default=64, metadata={"help": "units of the bottleneck"})
    activation: str = field(default="gelu", metadata={"help": "gelu or relu"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _KIND
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer and the network after it: down (size, out), up (out, size)."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    lifts_by_leaf = True
    """Its trained tensors are those of plain linear layers, which read the block's rows."""

    def __init__(self, base_layer: Any, adapter_name: str, config: BottleneckConfig, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict({}), nn.ModuleDict({})
        self.activations: dict[str, str] = {}
        self.width = width
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, **unused: Any) -> None:
        """Add the network of one adapter."""
        down, up = nn.Linear(self.width, config.size), nn.Linear(config.size, self.width)
        nn.init.normal_(down.weight, std=0.02)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activations[adapter_name] = config.activation
        own: Any = self
        own._move_adapter_to_device_of_base_layer(adapter_name)
        own.set_adapter(own.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output after the active networks, in the layer's dtype."""
        own: Any = self  # nn.Module's attributes have no types
        y: Tensor = own.base_layer(x, *args, **kwargs)
        for name in [] if own.disable_adapters else own.active_adapters:
            if name in own.bottleneck_down:
                down, up = own.bottleneck_down[name], own.bottleneck_up[name]
                inner = ACTIVATIONS[own.activations[name]](down(y.to(down.weight.dtype)))
                y = y + up(inner).to(y.dtype)
        return y

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: an activation stands between the two layers."""
        raise ValueError("a bottleneck adapter is not linear and cannot be merged")


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """Puts a bottleneck after every target."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # the caller names its targets

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        width = getattr(target, "nf", None) or getattr(target, "out_features", None)  # GPT-2's Conv1D calls it nf
        if not isinstance(width, int):
            raise ValueError(f"{current_key} is a {type(target).__name__}, not a linear layer")
        layer = BottleneckLayer(target, adapter_name, peft_config, width)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
