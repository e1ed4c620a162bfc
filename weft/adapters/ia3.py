"""ia3: one learned factor for each feature of keys, values and the feed-forward layer's inner activations.

Liu et al. 2022, arXiv:2205.05638 (through peft). A factor scales a row or a column of a frozen weight, so the
effective weight is linear in the factors: the mean of factors is the mean of the clients' weights, layer by layer.
"""

from typing import Annotated

from pydantic import Field
from torch import nn

from weft.adapters.attach import attached, check_targets
from weft.adapters.families import parts
from weft.core.types import Adapter

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]


def ia3(targets: list[Name] | None = None, feedforward: list[Name] | None = None) -> Adapter:
    """Train factors that begin at one, so that the first model is the base.

    targets: layers whose outputs are scaled. feedforward: layers whose inputs are scaled. Without them: keys and
    values, and the feed-forward block's last layer, as in the paper; a joint projection is scaled with its queries.
    """

    def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
        from peft import IA3Config

        outputs = list(parts(base, "adapter.ia3.targets").key_value if targets is None else targets)
        inputs = list(parts(base, "adapter.ia3.feedforward").feedforward_out if feedforward is None else feedforward)
        check_targets(base, outputs, "adapter.ia3.targets")
        if inputs:
            check_targets(base, inputs, "adapter.ia3.feedforward")
        config = IA3Config(target_modules=[*outputs, *inputs], feedforward_modules=inputs, task_type=peft_type)
        return attached(base, config, seed, "adapter.ia3")

    return Adapter(attach=attach)
