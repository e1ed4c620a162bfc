"""causal_lm: continue a prompt with an answer, or plain text; the loss counts the answer's tokens only.

Records: question/answer, instruction/(input)/output, prompt/completion, messages, or text (all of it is learned).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.core.metrics import added
from weft.core.task import Batch, Encoded, Example, Probe, Task
from weft.core.types import Metrics
from weft.tasks.head import answer_losses
from weft.tasks.prompts import pieces
from weft.tasks.text_metrics import GENERATED, answer_rows, text_summary
from weft.tasks.tokens import IGNORE, collate, cut, example_of, learnable, pack, shorten, sums_of

__all__ = ["IGNORE", "causal_lm"]


def causal_lm(
    template: str = "auto",
    max_length: Annotated[int, Field(gt=1)] = 512,
    language: Literal["en", "zh"] = "en",
) -> Task:
    """Fine-tune a language model on answers; metrics: loss and perplexity, rouge (1, 2, L), bleu (4), exact_match.

    template: `chat` uses the tokenizer's own chat template, `plain` writes `Question: ...`, `auto` takes chat where
    the tokenizer has one; any other text is the prompt itself, such as "Q: {question}\\nA:".
    max_length: in tokens; longer answers are cut at the end, longer prompts at the start; both are counted.
    language: how rouge and bleu cut answers into words; `zh`: each Chinese character is one, as sacrebleu's zh.
    """

    def encode(tokenizer: Any, records: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> Encoded:
        whole = [example_of(pieces(record, template, tokenizer), tokenizer) for record in records]
        short = [cut(example, max_length, tokenizer.bos_token_id) for example in whole]
        truncated = sum(len(after["ids"]) < len(before["ids"]) for before, after in zip(whole, short, strict=True))
        examples = [example for example in short if learnable(example)]
        return Encoded(examples, truncated, len(records) - len(examples))

    def each(probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...]) -> list[Metrics]:
        return answer_rows(probe, examples, metrics, (collate, _loss), language)

    return Task(
        auto="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        needs=(
            ("question", "answer"),
            ("instruction", "output"),
            ("prompt", "completion"),
            ("messages",),
            ("text",),
        ),
        metrics=("loss", *GENERATED),
        classes=lambda records: (),
        encode=encode,
        collate=collate,
        loss=_loss,
        shorten=shorten,
        pack=pack,
        measure=lambda probe, examples, metrics: added(each(probe, examples, metrics)),
        each=each,
        summarize=_summarize,
    )


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    sums = sums_of(answer_losses(model, batch), batch["counts"])
    return sums, torch.tensor(batch["counts"], device=sums.device)


def _summarize(sums: Metrics) -> Metrics:
    loss = sums["nll"] / sums["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **text_summary(sums)}
