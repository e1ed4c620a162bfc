"""Modules of known code: the very numbers of plain code, with fewer tensors kept or fewer passes over them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from weft.site import lean as module
from weft.site.lean import lean
from weft.tasks.causal_lm import causal_lm
from weft.testing.families import tiny

MLPS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
NORMS = {"llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "phi3": 5}


def known(family: str, name: str) -> list[nn.Module]:
    """Return the modules of a tiny model that are known, of classes whose names end so."""
    net = tiny(family, causal_lm().auto)
    assert isinstance(net, nn.Module)
    return [found for found in lean(net) if type(found).__name__.endswith(name)]


def passed(size: int, forward: object, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a forward gives and the gradient of its input; note the tensors that it keeps."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, size, generator=draw).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward(x)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    return out, grad


@pytest.mark.parametrize("family", MLPS)
def test_a_gated_mlp_of_the_very_numbers_keeps_one_tensor_fewer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an activation of any size; a small one, as here, is kept."""
    found = known(family, "MLP")
    assert len(found) == 2
    for mlp in found:
        size, forward = next(mlp.parameters()).shape[1], lean(mlp)[mlp]
        plain, small, own = list[Tensor](), list[Tensor](), list[Tensor]()
        expected = passed(size, mlp, plain)
        passed(size, forward, small)
        with monkeypatch.context() as patched:
            patched.setattr(module, "LEAST", 1)
            seen = passed(size, forward, own)
        assert len(small) == len(plain)
        assert torch.equal(seen[0], expected[0])
        assert torch.equal(seen[1], expected[1])
        assert len(own) == len(plain) - 1


@pytest.mark.parametrize("family", NORMS)
def test_a_norm_of_the_very_numbers(family: str) -> None:
    """Its gradient differs from plain code's by rounding alone."""
    found = known(family, "RMSNorm")
    assert len(found) == NORMS[family]
    for norm in found:
        weight = next(norm.parameters())
        nn.init.uniform_(weight, 0.5, 2.0)
        weight.requires_grad_(False)
        forward = lean(norm)[norm]
        expected, seen = passed(len(weight), norm, []), passed(len(weight), forward, [])
        assert torch.equal(seen[0], expected[0])
        torch.testing.assert_close(seen[1], expected[1], rtol=1e-5, atol=1e-5)
        assert not torch.equal(seen[1], 0 * expected[1])


def test_a_norm_by_hand() -> None:
    """Of 3 and 4 the mean square is 12.5; with s = 1/sqrt 12.5 the first has the gradient s (1 - 9/25), -s 12/25."""
    x = torch.tensor([[3.0, 4.0]]).requires_grad_()
    out = module._Normed.apply(x, torch.ones(2), 0.0)
    (grad,) = torch.autograd.grad(out[0, 0], x)
    scale = 12.5**-0.5
    assert out[0].tolist() == pytest.approx([3 * scale, 4 * scale])
    assert grad[0].tolist() == pytest.approx([scale * 16 / 25, -scale * 12 / 25])


def test_a_norm_that_is_trained_or_in_half_precision_is_the_plain_one() -> None:
    (norm, *_) = known("llama", "RMSNorm")
    trained, half = copy.deepcopy(norm).requires_grad_(), copy.deepcopy(norm).requires_grad_(False).bfloat16()
    size = len(next(norm.parameters()))
    x = torch.randn(3, size)
    out = lean(trained)[trained](x)
    (grad,) = torch.autograd.grad(out.sum(), list(trained.parameters()))
    assert grad.abs().sum() > 0
    assert torch.equal(lean(half)[half](x.bfloat16()), half(x.bfloat16()))
    assert lean(half)[half](x.bfloat16()).dtype == torch.bfloat16


def test_a_module_of_other_code_is_left_alone() -> None:
    assert [*known("gpt2", ""), *known("bloom", ""), *known("phi3", "MLP"), *known("gemma2", "RMSNorm")] == []

    class OtherMLP(nn.Module):
        """Adds where the known one multiplies."""

        def forward(self, x: Tensor) -> Tensor:
            return x + x

    class NoMLP(nn.Module):
        """Has no forward of its own."""

    class OtherRMSNorm(OtherMLP):
        """Has its forward of another class."""

    assert lean(nn.Sequential(OtherMLP(), NoMLP(), OtherRMSNorm())) == {}
