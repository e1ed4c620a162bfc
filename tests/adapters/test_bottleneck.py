"""bottleneck: what its layers compute, where they stand, and peft's switches."""

import pytest
import torch
from torch.nn import functional

from tests.adapters.on_tiny import moved, outputs, plain, put_on, trained
from weft.adapters.bottleneck import bottleneck
from weft.core.errors import JobError


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("bloom", {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("opt", {"self_attn.out_proj", "fc2"}),
    ],
)
def test_after_both_blocks_of_every_layer(family: str, layers: set[str]) -> None:
    names = {name.split(".bottleneck_")[0] for name in trained(put_on(bottleneck(), family))}
    assert len(names) == 4
    assert {layer for layer in layers if any(name.endswith(f".{layer}") for name in names)} == layers


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_layer_by_hand(activation: str) -> None:
    """It is y + up(activation(down(y))) on the output y of the base's layer."""
    net = moved(put_on(bottleneck(size=3, activation=activation)))  # type: ignore[arg-type]
    layer = net.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    with torch.no_grad():
        y = layer.base_layer(x)
        inner = getattr(functional, activation)(y @ down.weight.T + down.bias)
        assert torch.allclose(layer(x), y + inner @ up.weight.T + up.bias, atol=1e-6)


def test_size_and_count() -> None:
    """Four layers of 16 units with 3 between: 4 * (16 * 3 + 3 + 3 * 16 + 16) = 460."""
    assert sum(p.numel() for p in trained(put_on(bottleneck(size=3))).values()) == 460


def test_the_first_model_is_the_base_and_switching_off_brings_it_back() -> None:
    net = put_on(bottleneck())
    assert torch.equal(outputs(net), outputs(plain("llama")))
    moved(net)
    assert not torch.allclose(outputs(net), outputs(plain("llama")))
    with net.disable_adapter():
        assert torch.equal(outputs(net), outputs(plain("llama")))


def test_it_cannot_be_merged() -> None:
    assert not bottleneck().mergeable
    with pytest.raises(ValueError, match="is not linear"):
        put_on(bottleneck()).merge_and_unload()


def test_targets() -> None:
    """Named ones alone; after the feed-forward block only is Pfeiffer's variant."""
    names = {name.split(".bottleneck_")[0] for name in trained(put_on(bottleneck(targets=["down_proj"])))}
    assert names == {f"base_model.model.model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    with pytest.raises(JobError, match=r"adapter\.bottleneck\.targets: \['dense'\] match no layer"):
        put_on(bottleneck(targets=["dense"]))
    with pytest.raises(JobError, match=r"adapter\.bottleneck: .*not a linear layer"):
        put_on(bottleneck(targets=["norm"]))
