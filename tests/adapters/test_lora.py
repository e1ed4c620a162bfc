"""lora: its scale, its products, its layers, and its errors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.on_tiny import described, outputs, plain, put_on, through_folder
from weft.adapters.lora import lora
from weft.core.errors import JobError
from weft.core.types import Adapter
from weft.site.model import equip
from weft.tasks.causal_lm import causal_lm
from weft.testing.tiny import model, tokenizer

FACTORS = {
    "model.q_proj.lora_A.default.weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
    "model.q_proj.lora_B.default.weight": torch.tensor([[3.0, 1.0]]),
    "model.score.weight": torch.ones(2, 2),
}


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
    names = {name.split(".")[-4] for name in trainable(attached(lora(targets="all-linear"))) if ".lora_A." in name}
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


# --- dora, pissa, and factors whose rank is not the job's


def grown(net: Any, ranks: dict[str, int]) -> dict[str, Tensor]:
    """Return an adapter as some algorithms serve it: factors of larger ranks, by layer, at the scale of the job."""
    draw = torch.Generator().manual_seed(5)
    tensors = {}
    for name, p in trainable(net).items():
        rank = next((r for layer, r in ranks.items() if f".{layer}.lora_" in name), None)
        shape = list(p.shape)
        if rank and ".lora_A." in name:
            shape[0] = rank
        elif rank and ".lora_B." in name:
            shape[1] = rank
        tensors[name] = torch.randn(shape, generator=draw) * 0.1
    return dict(sorted(tensors.items()))


@pytest.mark.parametrize("ranks", [{"q_proj": 5, "v_proj": 5}, {"q_proj": 5, "v_proj": 3}, {"0.self_attn.q_proj": 7}])
@pytest.mark.parametrize("keys", [{}, {"rslora": True}, {"init": "pissa"}, {"init": "pissa", "rslora": True}])
def test_factors_of_another_rank_keep_the_scale(ranks: dict[str, int], keys: dict[str, Any]) -> None:
    """The model computes with alpha / the job's rank; the folder must say so of factors that have grown."""
    adapter = lora(rank=2, alpha=6, targets=["q_proj", "v_proj"], **keys)
    loaded = equip(plain("llama"), tokenizer(), adapter, causal_lm(), 7)
    told, tensors = described(loaded.net), grown(loaded.net, ranks)
    with loaded.holding(tensors) as net:
        expected = outputs(net)
    other = through_folder(adapter, tensors, told, plain("llama"))
    assert torch.allclose(outputs(other), expected, atol=1e-5)
    assert float((outputs(plain("llama")) - expected).abs().max()) > 1e-2
    assert torch.allclose(outputs(other.merge_and_unload()), expected, atol=1e-4)


def test_equal_ranks_need_no_patterns() -> None:
    adapter = lora(rank=2, alpha=6, targets=["q_proj", "v_proj"])
    net = attached(adapter)
    config = {"r": 2, "lora_alpha": 6.0}
    assert adapter.saved(trainable(net), {}, config)[1] == config
    even = adapter.saved(grown(net, {"q_proj": 8, "v_proj": 8}), {}, config)[1]
    assert even == {"r": 8, "lora_alpha": 24.0}  # 6 / 2 * 8


def test_pissa_begins_with_the_largest_singular_directions_and_the_base_s_outputs() -> None:
    adapter = lora(rank=2, alpha=6, targets=["q_proj"], init="pissa")
    base = model()
    weight = base.get_submodule("model.layers.0.self_attn.q_proj").weight.detach().clone()
    net = attached(adapter, base=base)
    assert adapter.products
    left, right = adapter.products(trainable(net))["base_model.model.model.layers.0.self_attn.q_proj"]
    u, s, v = torch.linalg.svd(weight)
    assert torch.allclose(left @ right, u[:, :2] * s[:2] @ v[:2], atol=1e-5)
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        assert torch.allclose(net(input_ids=ids).logits, model()(input_ids=ids).logits, atol=1e-5)


def test_pissa_has_one_sign() -> None:
    """Whatever signs the decomposition chose, the largest entry of each row of A is positive."""
    for name, factor in trainable(attached(lora(rank=4, init="pissa"))).items():
        if ".lora_A." in name:
            assert bool((factor.gather(1, factor.abs().argmax(1, keepdim=True)) > 0).all())


def test_dora_trains_the_row_lengths_too() -> None:
    adapter = lora(rank=2, targets=["q_proj"], dora=True)
    net = attached(adapter)
    lengths = {n: p for n, p in trainable(net).items() if ".lora_magnitude_vector." in n}
    weight = model().get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.allclose(lengths[min(lengths)], weight.norm(dim=1), atol=1e-6)
    assert adapter.products is None


def test_dora_with_pissa_is_refused() -> None:
    with pytest.raises(JobError, match=r"adapter\.lora\.init: pissa changes the base"):
        lora(dora=True, init="pissa")


def test_all_linear_layers_of_distilbert_and_roberta_but_the_new_ones() -> None:
    """By itself peft puts factors into pre_classifier, which is trained whole."""
    for family, layers in (("distilbert", {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}),
                           ("roberta", {"query", "key", "value", "dense"})):  # fmt: skip
        net = put_on(lora(rank=2, targets="all-linear"), family, "SEQ_CLS")
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(net) if ".lora_" in name}
        assert adapted == layers
        assert not [name for name in trainable(net) if "classifier" in name and ".lora_" in name]
