"""bottleneck: a small two-layer network after each attention block and each feed-forward block, in series.

Houlsby et al. 2019, arXiv:1902.00751 (its layer norms stay frozen here). Two clients' networks compute different
functions of their inner units, so the mean of their weights is not the mean of their functions: as with LoRA, the
error is small while clients stay near a common start. It is not linear, so it cannot be merged into the base.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from weft.adapters.attach import attached, check_targets
from weft.adapters.families import parts
from weft.core.types import Adapter

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]


def bottleneck(
    size: Annotated[int, Field(gt=0)] = 64,
    activation: Literal["gelu", "relu"] = "gelu",
    targets: list[Name] | None = None,
) -> Adapter:
    """Train y + up(activation(down(y))) on the output y of each target; `up` begins at zero, so y comes through.

    size: units of the bottleneck. targets: layers whose outputs are adapted; without them the last layer of every
    attention block and of every feed-forward block. peft reads the folder once Weft has brought its tuner:
    `weft.load_adapter(model, folder)`.
    """

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        from weft.adapters.bottleneck_tuner import BottleneckConfig, register

        register()
        found = targets
        if found is None:
            family = parts(base, "adapter.bottleneck.targets")
            found = [*family.attention_out, *family.feedforward_out]
        check_targets(base, found, "adapter.bottleneck.targets")
        config = BottleneckConfig(target_modules=found, size=size, activation=activation, task_type=peft_type)
        return attached(base, config, seed, "adapter.bottleneck")

    return Adapter(attach=attach, mergeable=False)
