"""The top of a model at labels alone: the last layer, the output layer and its loss, never all scores at once."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from weft.core import products
from weft.core.task import Batch
from weft.core.trees import at_least_float32

PIECE = {"cpu": 4 << 20, "cuda": 256 << 20}  # bytes of scores at a time: in a processor's cache, or enough for a GPU
ROWS = 256  # at least so many labels at a time go through the output layer: fewer make its product slower


def answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each label, -log p, client by client and example by example, (labels,)."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    length = batch["input_ids"].shape[-1]
    with last_only(model, batch["index"], length):
        return label_losses(model, batch, length, lambda: model(**given, use_cache=False).logits)


def label_losses(model: Any, batch: Batch, length: int, logits: Callable[[], Tensor]) -> Tensor:
    """Return the loss of each of the batch's `targets`, -log p, (labels,).

    length: tokens of a row that is read or written. logits: calls the model; its output layer is applied to the
    positions of `index` and to no other, and where it is frozen, a piece at a time together with the loss.
    """
    head = model.get_output_embeddings()
    with only(head, batch["index"], length):
        found = None if _OTHERWISE.get(head, False) else _at_once(head, batch["targets"], logits)
        if found is None:
            found = negative_log_likelihoods(at_least_float32(logits()[0]), batch["targets"])
    return found


@contextmanager
def only(head: nn.Module, index: Tensor, length: int) -> Iterator[None]:
    """Apply the output layer to the positions that have a label, and to no other.

    index: into the rows laid end to end. length: tokens of a row; virtual tokens that an adapter put in front of
    them make the rows longer here, and are skipped.
    """
    hook = head.register_forward_pre_hook(
        lambda module, args: (args[0][..., -length:, :].flatten(0, -2)[index].unsqueeze(0),)
    )
    try:
        yield
    finally:
        hook.remove()


_OTHERWISE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Output layers whose scores the model caps, copies or adds to: found out once, by calling it."""


def _at_once(head: nn.Module, targets: Tensor, logits: Callable[[], Tensor]) -> Tensor | None:
    """Return the losses of a plain linear layer that is neither trained nor lifted, whose scores are the logits."""
    if type(head) is not nn.Linear or "forward" in vars(head) or any(p.requires_grad for p in head.parameters()):
        return None
    seen: list[tuple[Tensor, Tensor]] = []

    def blank(states: Tensor) -> Tensor:
        """Return zeros in the place of scores, all of them one number in memory."""
        zeros = states.new_zeros(()).expand(*states.shape[:-1], len(head.weight))
        seen.append((states, zeros))
        return zeros

    head.forward = blank  # type: ignore[method-assign, assignment]
    try:
        found = logits()
    finally:
        del head.forward
    states, zeros = seen[0]
    if found is not zeros:
        _OTHERWISE[head] = True
        return None
    return _Scored.apply(states[0], head.weight, head.bias, targets)  # type: ignore[no-any-return]


class _Scored(torch.autograd.Function):
    """Output layer and cross entropy at once, so many rows at a time; their gradient is found on the way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Return log sum exp(scores) - scores[target]; states: (labels, in), weight: (words, in)."""
        size = max(ROWS, _rows(states, len(weight)))
        parts = max(1, -(-len(states) // size))  # of like length: a product of very few rows rounds otherwise
        grad = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        multiplied = products.product if products.suits(weight) else functional.linear
        losses = []
        for rows, own, into in zip(
            states.tensor_split(parts),
            targets.unsqueeze(-1).tensor_split(parts),
            [None] * parts if grad is None else grad.tensor_split(parts),
            strict=True,
        ):
            scores = at_least_float32(multiplied(rows, weight, bias))
            right, most = scores.gather(-1, own), scores.amax(-1, keepdim=True)
            whole = scores.sub_(most).exp_().sum(-1, keepdim=True)
            losses.append((whole.log() + most - right)[:, 0])
            if into is not None:
                scores.div_(whole).scatter_add_(-1, own, scores.new_full((len(own), 1), -1.0))
                torch.mm(scores.to(weight.dtype), weight, out=into)
            del scores  # before the next, which is as large
        ctx.save_for_backward(grad)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Return grad * (p - 1 at the target) times the weight."""
        (own,) = ctx.saved_tensors
        return own * grads[0].unsqueeze(-1).to(own.dtype), None, None, None


def negative_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of each target, (labels,); logits: (labels, words), which nothing may read after the backward pass.

    That pass writes its gradient over them. Beside it, torch's own cross entropy holds three more tensors as large as
    the logits, which are the largest of a step.
    """
    return _Likelihoods.apply(logits, targets)  # type: ignore[no-any-return]


class _Likelihoods(torch.autograd.Function):
    """Cross entropy in place, so many rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return log sum exp(logits) - logits[target]."""
        wholes = torch.cat([part.logsumexp(-1) for part in logits.split(_rows(logits, logits.shape[-1]))])
        ctx.save_for_backward(logits, targets, wholes)
        return wholes - logits.gather(-1, targets.unsqueeze(-1))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return grad * (p - 1 at the target)."""
        logits, targets, wholes = ctx.saved_tensors
        grad, size = grads[0], _rows(logits, logits.shape[-1])
        for part, whole, own in zip(logits.split(size), wholes.split(size), grad.split(size), strict=True):
            part.sub_(whole.unsqueeze(-1)).exp_().mul_(own.unsqueeze(-1))
        logits.scatter_add_(-1, targets.unsqueeze(-1), -grad.unsqueeze(-1))
        return logits, None


def _rows(on: Tensor, words: int) -> int:
    """Return how many rows of so many float32 scores are a piece, on that tensor's device."""
    return max(1, PIECE.get(on.device.type, PIECE["cuda"]) // max(1, 4 * words))


@contextmanager
def last_only(model: Any, index: Tensor, length: int) -> Iterator[None]:
    """Apply what the last layer does position by position to those that have a label: behind it nothing mixes them.

    These are its MLP and the products that make queries and what attention puts out; keys and values are wanted of all
    positions. Left alone where the model names them otherwise or calls them with more than one tensor, where dropout is
    inside or virtual tokens stand in front of a row, and where activations are computed again later, without this.
    """
    hooks = [hook for module in _last_ones(model) for hook in _at_labels(module, index, length)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _at_labels(module: nn.Module, index: Tensor, length: int) -> tuple[RemovableHandle, RemovableHandle]:
    """Let a module see the chosen positions alone, with zeros for what it would make of others."""
    whole: list[Tensor] = []

    def chosen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        whole.clear()
        if len(args) != 1 or kwargs or args[0].dim() != 3 or args[0].shape[1] != length:
            return None
        whole.append(args[0])
        return (args[0].flatten(0, 1)[index].unsqueeze(0),), {}

    def filled(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not whole:
            return None
        rows = whole.pop()
        return out.new_zeros(len(rows) * length, out.shape[-1]).index_copy(0, index, out[0]).view(*rows.shape[:2], -1)

    return module.register_forward_pre_hook(chosen, with_kwargs=True), module.register_forward_hook(filled)


_LAST: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
_APART = re.compile(r"mlp|(self_attn|attn|attention)\.(q_proj|o_proj|out_proj|c_proj|dense)")
"""What a decoder's layer calls position by position, by the names that models give it."""


def _last_ones(model: nn.Module) -> list[nn.Module]:
    """Return what the last layer, the last of all that have an `mlp`, calls so; looked for once a model."""
    if model not in _LAST:
        layers = [path.removesuffix(".mlp") for path, _ in model.named_modules() if re.search(r"\.\d+\.mlp$", path)]
        layer = layers[-1] if layers else ""
        above, _, number = layer.rpartition(".")
        again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        last = layer and not again and int(number) == len(model.get_submodule(above)) - 1  # type: ignore[arg-type]  # a list of layers
        inside = model.get_submodule(layer).named_modules() if last else []
        _LAST[model] = [f"{layer}.{path}" for path, found in inside if _APART.fullmatch(path) and not _draws(found)]
    return [model.get_submodule(path) for path in _LAST[model]]


def _draws(module: nn.Module) -> bool:
    """Tell whether something inside draws a mask, which is drawn for all positions."""
    return any(isinstance(inside, nn.Dropout) and inside.p > 0 for inside in module.modules())
