"""Prompts and answers as tokens: labels, what is cut, batches padded or packed, the output layer at labels alone."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from weft.core.task import Batch, Example
from weft.core.trees import at_least_float32
from weft.tasks.prompts import Piece

IGNORE = -100  # the label of a token that the loss does not count
PIECE = {"cpu": 4 << 20, "cuda": 256 << 20}  # bytes of logits at a time: in a processor's cache, or enough for a GPU


def example_of(parts: Sequence[Piece], tokenizer: Any) -> Example:
    """Tokenise piece by piece, so that a label never stands on a token shared with the prompt."""
    written = bool(tokenizer.bos_token) and parts[0].text.startswith(tokenizer.bos_token)  # by a chat template
    ids: list[int] = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) and not written else []
    labels = [IGNORE] * len(ids)
    prompt = 0
    for piece in parts:
        if piece.learned:
            prompt = len(ids)
        new = tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        if piece.ends and tokenizer.eos_token_id is not None:
            new = [*new, tokenizer.eos_token_id]
        ids.extend(new)
        labels.extend(new if piece.learned else [IGNORE] * len(new))
    return {
        "ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "prompt": prompt,
        "reference": (parts[-1].said or parts[-1].text).strip(),
    }


def _starts_with_bos(tokenizer: Any) -> bool:
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def surplus(example: Example, longest: int) -> int:
    """Return how many tokens a prompt loses at its start, where an example may have `longest`.

    It keeps half of them at least, and more where the answer is short.
    """
    prompt: int = example["prompt"]
    return max(0, min(prompt - longest // 2, len(example["ids"]) - longest))


def cut(example: Example, longest: int, bos: int | None, drop: int | None = None) -> Example:
    """Cut an example to `longest` tokens: its prompt at the start, by `surplus` or `drop`, its answer at the end.

    A prompt that is cut keeps its beginning-of-sequence token, without which some models write nonsense.
    """
    ids, labels, prompt = example["ids"], example["labels"], example["prompt"]
    drop = surplus(example, longest) if drop is None else drop
    kept = int(drop > 0 and bos is not None and int(ids[0]) == bos)
    ids, labels = (torch.cat([row[:kept], row[drop + kept :]])[:longest] for row in (ids, labels))
    return {**example, "ids": ids, "labels": labels, "prompt": prompt - drop}


def learnable(example: Example) -> bool:
    """Tell whether a token is left that can be learned: the first has nothing before it."""
    return bool((example["labels"][1:] != IGNORE).any())


def shorten(example: Example, longest: int) -> Example:
    """Cut an example to `longest` tokens, its first learned one left in it."""
    learned = int((example["labels"][1:] != IGNORE).nonzero()[0]) + 2
    return {
        key: value[: max(longest, learned)] if key in ("ids", "labels") else value for key, value in example.items()
    }


def _targets(rows: Sequence[Sequence[Example]]) -> list[list[Tensor]]:
    """Return for each example, client by client, the label of each position's next token."""
    return [[functional.pad(row["labels"][1:], (0, 1), value=IGNORE) for row in part] for part in rows]


def _counts(targets: Sequence[Sequence[Tensor]]) -> list[int]:
    return [sum(int((row != IGNORE).sum()) for row in part) for part in targets]


def collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    """Pad the examples of each client on the right; `index` and `targets`: where labels stand, rows end to end."""
    most = max(map(len, rows))
    filler = torch.tensor([pad])
    ids = [row for part in rows for row in [*(r["ids"] for r in part), *[filler] * (most - len(part))]]
    targets = _targets(rows)
    filled = [[*part, *[torch.full_like(filler, IGNORE)] * (most - len(part))] for part in targets]
    flat = pad_sequence([row for part in filled for row in part], batch_first=True, padding_value=IGNORE).flatten()
    index = (flat != IGNORE).nonzero()[:, 0]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "index": index,
        "targets": flat[index],
        "counts": _counts(targets),
    }


def end_to_end(rows: Sequence[Sequence[Example]]) -> Batch:
    """Lay the tokens of all clients' examples end to end in one row."""
    ids = [row["ids"] for part in rows for row in part]
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
        "lengths": [len(row) for row in ids],
        "tokens": [sum(len(row["ids"]) for row in part) for part in rows],
    }


def pack(rows: Sequence[Sequence[Example]]) -> Batch:
    """Lay the examples of all clients end to end; `index` and `targets`: where labels stand."""
    targets = _targets(rows)
    flat = torch.cat([row for part in targets for row in part])
    index = (flat != IGNORE).nonzero()[:, 0]
    return {**end_to_end(rows), "index": index, "targets": flat[index], "counts": _counts(targets)}


@contextmanager
def only(model: Any, index: Tensor, length: int) -> Iterator[None]:
    """Apply the output layer to the positions that have a label, and to no other.

    index: into the rows laid end to end. length: tokens of a row; virtual tokens that an adapter put in front of
    them make the rows longer here, and are skipped.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda module, args: (args[0][..., -length:, :].flatten(0, -2)[index].unsqueeze(0),)
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def last_only(model: Any, index: Tensor, length: int) -> Iterator[None]:
    """Apply the last layer's MLP to the positions that have a label: behind it nothing mixes positions.

    Left alone where the model names it otherwise or calls it with more than one tensor, where virtual tokens stand in
    front of a row, and where activations are computed again later, without this.
    """
    mlp = _last_mlp(model)
    if mlp is None:
        yield
        return
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

    hooks = mlp.register_forward_pre_hook(chosen, with_kwargs=True), mlp.register_forward_hook(filled)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_LAST: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _last_mlp(model: nn.Module) -> nn.Module | None:
    """Return the module called `mlp` of the last layer, which is the last of all so called; looked for once a model."""
    if model not in _LAST:
        paths = [path for path, _ in model.named_modules() if re.search(r"\.\d+\.mlp$", path)]
        path = paths[-1] if paths else ""
        above, _, number = path.removesuffix(".mlp").rpartition(".")
        again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        last = path and not again and int(number) == len(model.get_submodule(above)) - 1  # type: ignore[arg-type]  # a list of layers
        _LAST[model] = path if last else ""
    return model.get_submodule(_LAST[model]) if _LAST[model] else None


def answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each label, -log p, client by client and example by example, (labels,)."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    length = batch["input_ids"].shape[-1]
    with only(model, batch["index"], length), last_only(model, batch["index"], length):
        logits = model(**given, use_cache=False).logits[0]
    return negative_log_likelihoods(at_least_float32(logits), batch["targets"])


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
        wholes = torch.cat([part.logsumexp(-1) for part in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, targets, wholes)
        return wholes - logits.gather(-1, targets.unsqueeze(-1))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return grad * (p - 1 at the target)."""
        logits, targets, wholes = ctx.saved_tensors
        grad, size = grads[0], _rows(logits)
        for part, whole, own in zip(logits.split(size), wholes.split(size), grad.split(size), strict=True):
            part.sub_(whole.unsqueeze(-1)).exp_().mul_(own.unsqueeze(-1))
        logits.scatter_add_(-1, targets.unsqueeze(-1), -grad.unsqueeze(-1))
        return logits, None


def _rows(logits: Tensor) -> int:
    return max(1, PIECE.get(logits.device.type, PIECE["cuda"]) // max(1, logits.shape[-1] * logits.element_size()))


def sums_of(losses: Tensor, counts: Sequence[int]) -> Tensor:
    """Add up consecutive losses, so many at a time, (len(counts),)."""
    return torch.stack([part.sum() for part in losses.split(list(counts))])
