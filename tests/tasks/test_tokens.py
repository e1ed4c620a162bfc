"""The loss of each label, in place: torch's own numbers and gradients, whatever the pieces; what it must not touch."""

import pytest
import torch
from torch.nn import functional

from weft.tasks import tokens
from weft.tasks.tokens import negative_log_likelihoods


def given(labels: int, words: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, targets, and a weight for each loss; float64."""
    draw = torch.Generator().manual_seed(labels)
    logits = 20 * torch.randn(labels, words, generator=draw, dtype=torch.float64)
    targets = torch.randint(words, (labels,), generator=draw)
    return logits.requires_grad_(), targets, torch.rand(labels, generator=draw, dtype=torch.float64)


def test_two_labels_by_hand() -> None:
    """Logits (0, log 3): p = 1/4, 3/4; losses log 4 and log 4/3; gradients p - 1 at the target and p beside it."""
    logits = torch.tensor([[0.0, 3.0], [0.0, 3.0]]).clamp(min=1).log().requires_grad_()
    losses = negative_log_likelihoods(logits * 1, torch.tensor([0, 1]))
    assert losses.tolist() == pytest.approx([torch.tensor(4.0).log().item(), torch.tensor(4 / 3).log().item()])
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([-0.75, 0.75, 0.25, -0.25])


@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
@pytest.mark.parametrize("labels", [0, 1, 7])
def test_pieces_change_nothing(labels: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokens.PIECE, "cpu", piece)
    logits, targets, weights = given(labels, 11)
    losses = negative_log_likelihoods(logits * 1, targets)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((losses * weights).sum(), logits)
    (right,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(grad, right, rtol=0, atol=1e-12)


def test_logits_that_something_else_needs_are_not_overwritten_in_silence() -> None:
    """`exp` keeps what it returns for its own gradient: backward must refuse, and not go on with other numbers."""
    logits, targets, _ = given(3, 5)
    losses = negative_log_likelihoods(logits.exp(), targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
