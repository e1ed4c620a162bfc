"""Frozen products by oneDNN: torch's numbers and gradients, each row with bits of its own; where torch stays."""

import os

import pytest
import torch
from torch import nn

from weft.adapters.lora import lora
from weft.core import products
from weft.core.products import frozen
from weft.site.cohort import Cohort
from weft.tasks import head
from weft.tasks.causal_lm import causal_lm
from weft.testing import families
from weft.testing.families import equipped
from weft.testing.tiny import RECORDS

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every processor and every size count as one where it is faster."""
    monkeypatch.setattr(products, "faster", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(7,), (1, 33), (3, 2, 5), (0,)])
def test_numbers_and_gradients_are_those_of_torch(rows: tuple[int, ...], bias: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    layer = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    x = torch.randn(*rows, 48, generator=draw).requires_grad_()
    weights = torch.randn(*rows, 80, generator=draw)
    expected, found = layer(x), frozen(layer)[layer](x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (right,) = torch.autograd.grad((expected * weights).sum(), x)
    (grad,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_whatever_stands_beside_it() -> None:
    layer = nn.Linear(512, 640).requires_grad_(False)
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def both(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x[begin:end].detach().requires_grad_()
        out = frozen(layer)[layer](rows)
        return out, torch.autograd.grad(out.square().sum(), rows)[0]

    out, grad = both(0, 300)
    for begin, end in ((0, 2), (3, 40), (100, 229)):
        few, its = both(begin, end)
        assert torch.equal(few, out[begin:end])
        assert torch.equal(its, grad[begin:end])


def test_only_large_frozen_float32_layers_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        """May do anything in its forward."""

    plain, trained, half = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).bfloat16()
    net = nn.Sequential(plain, half, Own(8, 8)).requires_grad_(False).append(trained)
    assert list(frozen(net)) == [plain]
    assert frozen(net)[plain](torch.ones(1, 8, dtype=torch.float64).float()).dtype == torch.float32
    torch.backends.mkldnn.set_flags(False)
    switched_off = frozen(net)
    torch.backends.mkldnn.set_flags(True)
    assert switched_off == {}
    monkeypatch.setattr(products, "LEAST", 65)
    assert frozen(net) == {}
    monkeypatch.setattr(products, "LEAST", 64)
    assert list(frozen(net)) == [plain]
    monkeypatch.setattr(products, "faster", lambda: False)
    assert frozen(net) == {}


@pytest.mark.parametrize(("kind", "below"), [("lora", True), ("dora", False)])
def test_a_layer_below_one_that_is_lifted_whole_stays_plain(kind: str, below: bool) -> None:
    """Its forward runs under vmap there, which knows torch's own products alone; control: LoRA lifts leaf by leaf."""
    loaded = equipped(lora(rank=2, targets=["q_proj"], dora=kind == "dora"), causal_lm(), "llama")
    paths = {path for path, module in loaded.net.named_modules() if module in loaded.lift.lean}
    assert any(path.endswith("q_proj.base_layer") for path in paths) == below
    assert any(path.endswith("k_proj") for path in paths)


def test_the_output_layer_is_left_to_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes with the loss a piece at a time; a forward of its own there would make all scores at once."""
    task, used = causal_lm(), list[int]()
    loaded = equipped(lora(rank=2), task, "llama")
    apply = head._Scored.apply
    monkeypatch.setattr(head._Scored, "apply", lambda *given: used.append(1) or apply(*given))
    rows = task.encode(loaded.tokenizer, RECORDS[:2], ()).examples
    start = {name: p.detach()[None].clone() for name, p in loaded.initial.items()}
    Cohort(loaded, task, families.RECIPE, 0, "packed", loaded.lift).train(1, {"one": rows}, start, {}, None)
    assert used


def test_code_is_kept_for_so_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a number that the user set stays."""
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    frozen(nn.Linear(8, 8).requires_grad_(False))
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("1", "7")
