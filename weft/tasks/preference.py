"""preference: prefer one answer to another (DPO), by their log-probabilities beside those of the base.

Rafailov et al. 2023, arXiv:2305.18290; smoothed labels (conservative DPO): Mitchell 2023. The reference is the base
with the adapter off, not a second model; it never changes, so it reads each pair once, before the first round.

Records: prompt, chosen, rejected.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from weft.core.metrics import added
from weft.core.task import Batch, Encoded, Example, Probe, Task
from weft.core.trees import on_device
from weft.core.types import Metrics
from weft.tasks import tokens
from weft.tasks.head import answer_losses
from weft.tasks.prompts import pieces
from weft.tasks.text_metrics import alike

REFERENCE = "base"
"""Key of an example: the base's log-probabilities of its chosen and its rejected answer, (2,)."""


def preference(
    beta: Annotated[float, Field(gt=0)] = 0.1,
    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0,
    template: str = "auto",
    max_length: Annotated[int, Field(gt=1)] = 512,
) -> Task:
    """Learn to prefer `chosen` to `rejected` after `prompt`; metrics: loss, reward_margin, reward_accuracy.

    beta: an answer's reward is beta (log p - log p of the base); the loss is -log sigmoid of the chosen answer's
    reward less the rejected one's. smoothing: the part of pairs that may be labelled the wrong way round.
    template: as in causal_lm. max_length: in tokens, of the prompt with either answer; both lose the same tokens of a
    long prompt. reward_accuracy: the part of pairs whose chosen answer has the larger reward; equal counts half.
    """

    def encode(tokenizer: Any, records: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> Encoded:
        examples, truncated = [], 0
        for record in records:
            whole = [_answer(record, which, template, tokenizer) for which in ("chosen", "rejected")]
            drop = max(tokens.surplus(answer, max_length) for answer in whole)
            pair = [tokens.cut(answer, max_length, tokenizer.bos_token_id, drop) for answer in whole]
            truncated += any(len(new["ids"]) < len(old["ids"]) for new, old in zip(pair, whole, strict=True))
            if all(tokens.learnable(answer) for answer in pair):
                examples.append(_pair(*pair))
        return Encoded(examples, truncated, len(records) - len(examples))

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = _losses(_rewards(model, batch, beta), smoothing)
        return tokens.sums_of(losses, batch["pairs"]), torch.tensor(batch["pairs"], device=losses.device)

    def each(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> list[Metrics]:
        found: dict[int, Metrics] = {}
        device = next(probe.model.parameters()).device
        for rows in alike(examples, probe.batch):
            batch = _collate([[examples[i] for i in rows]], probe.tokenizer.pad_token_id)
            margins = _rewards(probe.model, on_device(batch, device), beta)
            right = 0.5 + 0.5 * margins.sign()  # equal counts half
            values = zip(_losses(margins, smoothing).tolist(), margins.tolist(), right.tolist(), strict=True)
            for i, (lost, margin, won) in zip(rows, values, strict=True):
                found[i] = {"loss": lost, "margin": margin, "right": won, "count": 1.0}
        return [found[i] for i in range(len(examples))]

    return Task(
        auto="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        needs=(("prompt", "chosen", "rejected"),),
        metrics=("loss", "reward_margin", "reward_accuracy"),
        classes=lambda records: (),
        encode=encode,
        collate=_collate,
        loss=loss,
        shorten=_shorten,
        pack=_pack,
        measure=lambda probe, examples, metrics: added(each(probe, examples, metrics)),
        each=each,
        summarize=_summarize,
        refer=_refer,
    )


def _answer(record: Mapping[str, Any], which: str, template: str, tokenizer: Any) -> Example:
    asked = {"prompt": record["prompt"], "completion": record[which]}
    return tokens.example_of(pieces(asked, template, tokenizer, "preference"), tokenizer)


def _pair(chosen: Example, rejected: Example) -> Example:
    return {
        "ids": chosen["ids"],
        "labels": chosen["labels"],
        "rejected_ids": rejected["ids"],
        "rejected_labels": rejected["labels"],
    }


def _answers(rows: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """Return each client's pairs as rows of their own: chosen, rejected, chosen, rejected, ..."""
    return [
        [{"ids": pair[f"{which}ids"], "labels": pair[f"{which}labels"]} for pair in part for which in ("", "rejected_")]
        for part in rows
    ]


def _with_reference(batch: Batch, rows: Sequence[Sequence[Example]], answers: Sequence[Sequence[Example]]) -> Batch:
    labels = [int((answer["labels"][1:] != tokens.IGNORE).sum()) for part in answers for answer in part]
    known = [pair[REFERENCE] for part in rows for pair in part if REFERENCE in pair]
    base = {REFERENCE: torch.stack(known)} if known else {}  # none while the base itself is asked
    return {**batch, **base, "answers": labels, "pairs": [len(part) for part in rows]}


def _collate(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    answers = _answers(rows)
    own = [(len(part), max((len(answer["ids"]) for answer in part), default=1)) for part in answers]
    return _with_reference(tokens.collate(answers, pad), rows, answers) | {"own": own}


def _pack(rows: Sequence[Sequence[Example]]) -> Batch:
    answers = _answers(rows)
    return _with_reference(tokens.pack(answers), rows, answers)


def _shorten(example: Example, longest: int) -> Example:
    """Cut both answers; what the base said of the whole ones stays."""
    short: Example = {}
    for which in ("", "rejected_"):
        answer = {"ids": example[f"{which}ids"], "labels": example[f"{which}labels"]}
        short |= {f"{which}{key}": value for key, value in tokens.shorten(answer, longest).items()}
    return {**example, **short}


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Return log p of each pair's answers, summed over their tokens, (pairs, 2)."""
    return -tokens.sums_of(answer_losses(model, batch), batch["answers"]).view(-1, 2)


@torch.no_grad()
def _refer(base: nn.Module, examples: Sequence[Example], pad: int, size: int) -> list[Example]:
    found: dict[int, Tensor] = {}
    device = next(base.parameters()).device
    for rows in alike(examples, size):
        batch = on_device(_collate([[examples[i] for i in rows]], pad), device)
        found.update(zip(rows, _log_probabilities(base, batch).cpu(), strict=True))
    return [{**example, REFERENCE: found[i]} for i, example in enumerate(examples)]


def _rewards(model: nn.Module, batch: Batch, beta: float) -> Tensor:
    """Return the reward of each pair's chosen answer less that of its rejected one, (pairs,)."""
    rewards: Tensor = beta * (_log_probabilities(model, batch) - batch[REFERENCE])
    return rewards[:, 0] - rewards[:, 1]


def _losses(margins: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * functional.logsigmoid(margins) - smoothing * functional.logsigmoid(-margins)


def _summarize(sums: Metrics) -> Metrics:
    return {
        "loss": sums["loss"] / sums["count"],
        "reward_margin": sums["margin"] / sums["count"],
        "reward_accuracy": sums["right"] / sums["count"],
    }
