"""The top of a model at labels alone: torch's own numbers and gradients, whatever the pieces; what is not touched."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional

from weft.adapters.lora import lora
from weft.site.model import equip
from weft.tasks import head
from weft.tasks.causal_lm import causal_lm
from weft.tasks.head import negative_log_likelihoods
from weft.tasks.seq2seq import seq2seq
from weft.testing import families
from weft.testing.families import double, equipped
from weft.testing.tiny import RECORDS


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
    monkeypatch.setitem(head.PIECE, "cpu", piece)
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "opt"])
def test_the_last_layer_at_labels_alone_changes_no_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all positions, in float64; gpt2's queries come with keys; bloom's MLP takes two tensors, opt has none."""
    loaded = double(equipped(lora(rank=2, targets="all-linear"), causal_lm(), family))
    batch = causal_lm().collate([causal_lm().encode(loaded.tokenizer, RECORDS[:3], ()).examples], 0)
    rows: list[int] = []

    def gradients() -> list[torch.Tensor]:
        for value in loaded.initial.values():
            value.grad = None
        causal_lm().loss(loaded.net, batch)[0].sum().backward()
        return [value.grad.clone() for value in loaded.initial.values() if value.grad is not None]

    gradients()  # gemma2's capped scores are found out in the first pass, which then begins again
    for module in head._last_ones(loaded.net):
        module.register_forward_hook(lambda module, args, out: rows.append(args[0].flatten(0, -2).shape[0]))
    few = gradients()
    monkeypatch.setattr(head, "last_only", lambda *given: nullcontext())
    everywhere = gradients()
    assert len(few) == len(everywhere) == len(loaded.initial)
    assert max(float((one - other).abs().max()) for one, other in zip(few, everywhere, strict=True)) < 1e-11
    labels, positions = len(batch["targets"]), batch["input_ids"].numel()
    known = {"bloom": 0, "opt": 0, "gpt2": 2}.get(family, 3)
    expected = [positions] * 2 if family == "bloom" else [labels] * known + [positions] * known
    assert rows == expected


def test_a_last_layer_that_is_computed_again_or_draws_masks_is_kept_whole() -> None:
    """It would be computed without the choice, and masks are drawn for all; control: without either there is one."""
    base = families.tiny("llama", causal_lm().auto)

    def chosen(dropout: float, again: bool) -> list[str]:
        adapter = lora(rank=2, dropout=dropout, targets=["q_proj", "up_proj"])
        net = equip(copy.deepcopy(base), None, adapter, causal_lm(), 0, checkpointing=again).net
        return [path.rpartition(".")[2] for path, module in net.named_modules() if module in head._last_ones(net)]

    assert chosen(0.0, again=False) == ["q_proj", "o_proj", "mlp"]
    assert chosen(0.1, again=False) == ["o_proj"]
    assert chosen(0.0, again=True) == []


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("labels", [0, 1, 7])
def test_an_output_layer_with_its_loss_is_that_of_torch(
    labels: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "ROWS", rows)
    monkeypatch.setitem(head.PIECE, "cpu", 1)
    draw = torch.Generator().manual_seed(labels)
    layer = torch.nn.Linear(5, 11, dtype=torch.float64).requires_grad_(False)
    states = 3 * torch.randn(labels, 5, generator=draw, dtype=torch.float64).requires_grad_()
    targets = torch.randint(11, (labels,), generator=draw)
    weights = torch.rand(labels, generator=draw, dtype=torch.float64)
    losses = head._Scored.apply(states, layer.weight, layer.bias, targets)
    expected = functional.cross_entropy(layer(states), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((losses * weights).sum(), states)
    (right,) = torch.autograd.grad((expected * weights).sum(), states)
    torch.testing.assert_close(grad, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "targets", "at_once"),
    [("llama", "all-linear", True), ("gpt2", "all-linear", True), ("t5", "all-linear", True),
     ("llama", ["lm_head"], False), ("gemma2", "all-linear", False), ("bart", "all-linear", False),
     ("opt", "all-linear", False)],
)  # fmt: skip
def test_only_a_frozen_layer_whose_scores_are_the_logits_goes_with_the_loss(
    family: str, targets: str | list[str], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma2 caps its scores, bart adds to them and opt copies them; both ways give the gradients of torch's loss."""
    task = seq2seq() if family in ("t5", "bart") else causal_lm()
    loaded = double(equipped(lora(rank=2, targets=targets), task, family))
    loaded.net.eval()
    batch = task.collate([task.encode(loaded.tokenizer, RECORDS[:3], ()).examples], 0)
    used: list[int] = []
    apply = head._Scored.apply
    monkeypatch.setattr(head._Scored, "apply", lambda *given: used.append(1) or apply(*given))

    def gradients() -> list[torch.Tensor]:
        for value in loaded.initial.values():
            value.grad = None
        task.loss(loaded.net, batch)[0].sum().backward()
        return [value.grad.clone() for value in loaded.initial.values() if value.grad is not None]

    found = gradients()
    assert bool(used) == at_once
    monkeypatch.setattr(head, "_at_once", lambda *given: None)
    monkeypatch.setattr(
        head, "negative_log_likelihoods", lambda logits, own: functional.cross_entropy(logits, own, reduction="none")
    )
    right = gradients()
    assert len(found) == len(right) == len(loaded.initial)
    assert max(float((one - other).abs().max()) for one, other in zip(found, right, strict=True)) < 1e-11
    assert max(float(value.abs().max()) for value in right) > 1e-3
