"""lora: its scale, its products, its layers, and its errors."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from weft.adapters.lora import lora
from weft.core.errors import JobError
from weft.core.types import Adapter
from weft.testing.tiny import model

FACTORS = {
    "model.q_proj.lora_A.default.weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
    "model.q_proj.lora_B.default.weight": torch.tensor([[3.0, 1.0]]),
    "model.score.weight": torch.ones(2, 2),
}


@pytest.fixture(autouse=True)
def _peft_calls_a_name_that_is_being_renamed() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def attached(adapter: Adapter, seed: int = 7, kind: str = "CAUSAL_LM", base: nn.Module | None = None) -> nn.Module:
    return adapter.attach(base or model(), kind, seed).eval()


def trainable(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def delta(adapter: Adapter) -> list[list[float]]:
    assert adapter.products
    ((name, (left, right)),) = adapter.products(FACTORS).items()
    assert name == "model.q_proj"
    result: list[list[float]] = (left @ right).tolist()
    return result


def test_the_scale_is_alpha_by_rank() -> None:
    """B A = (3 * 1 + 1 * 0, 3 * 2 + 1 * 1) = (3, 7); 16 / 2 times that is (24, 56)."""
    assert delta(lora(rank=2, alpha=16)) == [[24.0, 56.0]]


def test_the_stabilised_scale_is_alpha_by_the_root_of_rank() -> None:
    """For rank 4 it is 16 / 2 = 8, where the plain scale is 16 / 4 = 4."""
    assert delta(lora(rank=4, alpha=16, rslora=True)) == [[24.0, 56.0]]
    assert delta(lora(rank=4, alpha=16)) == [[12.0, 28.0]]


def test_peft_computes_with_the_same_scale() -> None:
    """The output of a layer with A and B of ones is x W^T + scale * rank * sum(x)."""
    net = attached(lora(rank=4, alpha=6, rslora=True, targets=["q_proj"]))
    layer = net.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".lora_" in name:
                value.fill_(1.0)
        plain = layer.base_layer(x)  # type: ignore[operator]
        assert torch.allclose(layer(x), plain + 6 / 2 * 4 * x.sum(1, keepdim=True), atol=1e-4)


def test_all_linear_layers_but_the_head() -> None:
    names = {name.split(".")[-4] for name in trainable(attached(lora())) if ".lora_A." in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_layers_only() -> None:
    names = {name.split(".lora_")[0] for name in trainable(attached(lora(targets=["v_proj"])))}
    assert names == {f"base_model.model.model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)}


def test_a_classifier_trains_its_head_as_well() -> None:
    net = attached(lora(targets=["q_proj"]), kind="SEQ_CLS", base=model("AutoModelForSequenceClassification", labels=3))
    heads = [name for name in trainable(net) if ".lora_" not in name]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]


def test_b_is_zero_and_the_first_output_the_base_s_bit_for_bit() -> None:
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        expected = model()(input_ids=ids).logits
        net = attached(lora(dropout=0.5))
        assert torch.equal(net(input_ids=ids).logits, expected)
    factors = trainable(net)
    assert all(not value.any() for name, value in factors.items() if ".lora_B." in name)
    assert all(value.any() for name, value in factors.items() if ".lora_A." in name)


def test_the_seed_draws_a() -> None:
    one, same, other = (trainable(attached(lora(), seed)) for seed in (7, 7, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_target_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(JobError, match=r"adapter\.lora\.targets: .*query.* layer .* q_proj, .*v_proj"):
        attached(lora(targets=["query"]))


def test_a_rank_above_a_side_is_refused() -> None:
    """A key projection of this model is 16 x 8: rank 8 is its most."""
    assert trainable(attached(lora(rank=8, targets=["k_proj"])))
    with pytest.raises(JobError, match=r"adapter\.lora\.rank: 9 is more than a side of .*k_proj \(8\); lower it"):
        attached(lora(rank=9, targets=["k_proj"]))
