"""Loss, ROUGE-1/2/L, BLEU-4 and exact match of answers, as sums: sites return sums, so pooled scores are exact.

ROUGE is the mean F-measure of rouge_score with stemming; BLEU is sacrebleu's corpus BLEU (13a tokens, no
smoothing), whose n-gram counts and lengths add up over clients. For Chinese both read the tokens of sacrebleu's `zh`:
each character is one, each word in another script is one. (Scores over the words that jieba finds are others.) An
answer matches exactly where it is its reference, white space at both ends aside.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from weft.core.metrics import added
from weft.core.task import Batch, Example, Probe
from weft.core.trees import on_device
from weft.core.types import Metrics

ROUGE = ("rouge1", "rouge2", "rougeL")
GENERATED = ("rouge", "bleu", "exact_match")
"""The metrics that ask for text."""
TOKENS = {"en": "13a", "zh": "zh"}
"""Language -> sacrebleu's tokens."""
Ways = tuple[Callable[[Sequence[Sequence[Example]], int], Batch], Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]]
"""A task's collate and loss."""


def answer_rows(
    probe: Probe, examples: Sequence[Example], metrics: tuple[str, ...], ways: Ways, language: str
) -> list[Metrics]:
    """Return of each example the loss over its labels and, of the first `generated`, what its text scores."""
    collate, loss = ways
    found: list[Metrics] = [{} for _ in examples]
    device = next(probe.model.parameters()).device
    for rows in alike(examples, probe.batch):
        batch = on_device(collate([[examples[i]] for i in rows], probe.tokenizer.pad_token_id), device)
        losses, tokens = loss(probe.model, batch)
        for i, lost, count in zip(rows, losses.tolist(), tokens.tolist(), strict=True):
            found[i] = {"nll": lost, "tokens": float(count), "count": 1.0}
    if set(GENERATED) & set(metrics):
        chosen = examples[: probe.generated]
        scores = score_each(generate(probe, chosen), [example["reference"] for example in chosen], language)
        for row, scored in zip(found, scores, strict=False):
            row |= scored
    return found


def alike(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Return the example numbers of batches of this size, alike in length."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["ids"]))
    return [order[at : at + size] for at in range(0, len(order), size)]


@torch.no_grad()
def generate(probe: Probe, examples: Sequence[Example]) -> list[str]:
    """Continue the prompts greedily, in batches padded on the left; return the texts in the given order."""
    texts = [""] * len(examples)
    for rows in _batches(probe, examples):
        for i, text in zip(rows, _continue(probe, [examples[i] for i in rows]), strict=True):
            texts[i] = text
    return texts


def _batches(probe: Probe, examples: Sequence[Example]) -> list[list[int]]:
    """Return the example numbers of each batch, alike in length.

    Virtual tokens stand in front of the padding, where its length would move them away from the text: with them a
    batch of a decoder holds prompts of one length only. An encoder's padding stands behind the text.
    """
    if probe.model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return alike(examples, probe.batch)
    order = sorted(range(len(examples)), key=lambda i: examples[i]["prompt"])
    virtual = _virtual(probe.model)
    groups = [list(rows) for _, rows in groupby(order, lambda i: examples[i]["prompt"] if virtual else 0)]
    return [rows[at : at + probe.batch] for rows in groups for at in range(0, len(rows), probe.batch)]


def _virtual(model: Any) -> int:
    """Return how many virtual tokens peft puts in front of each row."""
    return int(model.active_peft_config.num_virtual_tokens) if hasattr(model, "prompt_encoder") else 0


def _continue(probe: Probe, examples: Sequence[Example]) -> list[str]:
    """Continue prompts, padded on the left; an encoder reads whole inputs, padded on the right."""
    model: Any = probe.model
    pad, encoder = probe.tokenizer.pad_token_id, model.config.is_encoder_decoder
    prompts = [row["ids"] if encoder else row["ids"][: max(1, row["prompt"])] for row in examples]
    side = "right" if encoder else "left"
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True, padding_side=side)
    longest = 0 if encoder else ids.shape[1]
    room = getattr(model.config, "max_position_embeddings", None) or 10**9
    device = next(model.parameters()).device
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # peft counts from the virtual tokens on
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(1, min(probe.max_new_tokens, room - longest - _virtual(model))),
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
    decoded: list[str] = probe.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in decoded]


class _Words:
    """sacrebleu's tokens in the form in which rouge_score asks for them."""

    def __init__(self, name: str) -> None:
        from sacrebleu.metrics import BLEU

        self.cut = BLEU(tokenize=name).tokenizer

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text."""
        return str(self.cut(text)).split()


def score_each(predictions: Sequence[str], references: Sequence[str], language: str = "en") -> list[Metrics]:
    """Return what each pair adds to ROUGE, to the corpus BLEU and to exact match."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    words = TOKENS[language]
    scorer = RougeScorer(list(ROUGE), use_stemmer=True, tokenizer=None if language == "en" else _Words(words))
    corpus = BLEU(smooth_method="none", tokenize=words)
    rows: list[Metrics] = []
    for text, reference in zip(predictions, references, strict=True):
        found = scorer.score(reference, text)
        bleu = corpus.corpus_score([text], [[reference]])
        counts = {f"bleu.match{n}": bleu.counts[n - 1] for n in range(1, 5)}
        totals = {f"bleu.total{n}": bleu.totals[n - 1] for n in range(1, 5)}
        lengths = {"bleu.output": bleu.sys_len, "bleu.reference": bleu.ref_len}
        whole = counts | totals | lengths | {"exact_match": text.strip() == reference.strip()}
        sums = {name: float(value) for name, value in whole.items()}
        rows.append({"generated": 1.0} | {name: found[name].fmeasure for name in ROUGE} | sums)
    return rows


def score(predictions: Sequence[str], references: Sequence[str], language: str = "en") -> Metrics:
    """Return the sums behind ROUGE, BLEU and exact match."""
    return added(score_each(predictions, references, language))


def text_summary(sums: Metrics) -> Metrics:
    """Return rouge1, rouge2, rougeL, bleu4 and exact_match (0 to 1); empty where nothing was generated."""
    if not sums.get("generated"):
        return {}
    from sacrebleu.metrics import BLEU

    bleu = BLEU.compute_bleu(
        correct=[int(sums[f"bleu.match{n}"]) for n in range(1, 5)],
        total=[int(sums[f"bleu.total{n}"]) for n in range(1, 5)],
        sys_len=int(sums["bleu.output"]),
        ref_len=int(sums["bleu.reference"]),
        smooth_method="none",
    )
    means = {name: sums[name] / sums["generated"] for name in (*ROUGE, "exact_match")}
    return {**means, "bleu4": bleu.score / 100}
