"""A gated MLP that computes its activation again: the very numbers of plain code, with fewer tensors kept."""

import pytest
import torch
from torch import Tensor, nn

from weft.site import gated as module
from weft.site.gated import gated
from weft.tasks.causal_lm import causal_lm
from weft.testing.families import tiny


def mlps(family: str) -> list[nn.Module]:
    net = tiny(family, causal_lm().auto)
    assert isinstance(net, nn.Module)
    return list(gated(net))


def passed(mlp: nn.Module, forward: object, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a forward gives and the gradient of its input; note the tensors that it keeps."""
    draw = torch.Generator().manual_seed(1)
    size = next(mlp.parameters()).shape[1]
    x = torch.randn(7, size, generator=draw).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward(x)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    return out, grad


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_the_very_numbers_with_one_tensor_fewer_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an activation of any size; a small one, as here, is kept."""
    net = tiny(family, causal_lm().auto)
    assert isinstance(net, nn.Module)
    for mlp, forward in gated(net).items():
        plain, small, own = list[Tensor](), list[Tensor](), list[Tensor]()
        expected = passed(mlp, mlp, plain)
        passed(mlp, forward, small)
        with monkeypatch.context() as patched:
            patched.setattr(module, "LEAST", 1)
            found = passed(mlp, forward, own)
        assert len(small) == len(plain)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert len(own) == len(plain) - 1


def test_an_mlp_of_other_code_is_left_alone() -> None:
    assert len(mlps("llama")) == 2
    assert mlps("phi3") == mlps("gpt2") == mlps("bloom") == []

    class OtherMLP(nn.Module):
        """Adds where the known one multiplies."""

        def forward(self, x: Tensor) -> Tensor:
            return x + x

    class NoMLP(nn.Module):
        """Has no forward of its own."""

    assert gated(nn.Sequential(OtherMLP(), NoMLP())) == {}
