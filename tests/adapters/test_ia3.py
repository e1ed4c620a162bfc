"""ia3: its factors by hand, their mean, its layers and its errors."""

from typing import Any

import pytest
import torch

from tests.adapters.on_tiny import described, moved, outputs, plain, put_on, through_folder, trained
from weft.adapters.ia3 import ia3
from weft.core.errors import JobError


def last(net: Any) -> set[str]:
    return {name.split(".ia3_l")[0].rpartition(".")[2] for name in trained(net)}


def test_keys_values_and_the_feed_forward_layer() -> None:
    assert last(put_on(ia3())) == {"k_proj", "v_proj", "down_proj"}
    assert last(put_on(ia3(), "gpt2")) == {"c_attn", "c_proj"}
    assert last(put_on(ia3(targets=["o_proj"], feedforward=[]))) == {"o_proj"}


def test_a_factor_scales_outputs_and_the_feed_forward_s_inputs() -> None:
    """With factors of two, a key is 2 W x and the feed-forward layer gives W (2 x)."""
    net = put_on(ia3())
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".ia3_l" in name:
                p.fill_(2.0)
        for part, wide in (("self_attn.k_proj", 16), ("mlp.down_proj", 24)):
            layer = net.get_submodule(f"base_model.model.model.layers.0.{part}")
            x = torch.randn(3, wide, generator=torch.Generator().manual_seed(0))
            assert torch.allclose(layer(x), 2 * layer.base_layer(x), atol=1e-5)


def test_the_first_model_is_the_base() -> None:
    assert torch.equal(outputs(put_on(ia3())), outputs(plain("llama")))


def test_the_mean_of_factors_is_the_mean_of_weights() -> None:
    """Merged, W diag(l) is linear in l: (W diag(1.2) + W diag(0.4)) / 2 = W diag(0.8)."""
    weights = []
    for factor in (1.2, 0.4, 0.8):
        net = put_on(ia3())
        with torch.no_grad():
            for name, p in net.named_parameters():
                if ".ia3_l" in name:
                    p.fill_(factor)
        weights.append(net.merge_and_unload().model.layers[0].mlp.down_proj.weight)
    assert torch.allclose((weights[0] + weights[1]) / 2, weights[2], atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_merging_gives_the_same_outputs(family: str) -> None:
    net = put_on(ia3(), family)
    told = described(net)
    moved(net)
    merged = through_folder(ia3(), trained(net), told, plain(family)).merge_and_unload()
    assert torch.allclose(outputs(merged), outputs(net), atol=1e-5)


def test_layers_that_are_not_there() -> None:
    with pytest.raises(JobError, match=r"adapter\.ia3\.targets: \['query'\] match no layer"):
        put_on(ia3(targets=["query"]))
    with pytest.raises(JobError, match=r"adapter\.ia3\.feedforward: \['fc'\] match no layer"):
        put_on(ia3(feedforward=["fc"]))


def test_an_unknown_family_must_name_its_layers() -> None:
    net = plain("llama")
    net.config.model_type = "novel"
    with pytest.raises(JobError, match=r"adapter\.ia3\.targets: Weft does not know the layers of the family novel"):
        ia3().attach(net, "CAUSAL_LM", 0)
    assert last(ia3(targets=["v_proj"], feedforward=["down_proj"]).attach(net, "CAUSAL_LM", 0)) == {
        "v_proj",
        "down_proj",
    }
