"""ROUGE-1/2/L and BLEU-4 of generated answers, as sums: sites return sums, so pooled scores are exact.

ROUGE is the mean F-measure of rouge_score with stemming; BLEU is sacrebleu's corpus BLEU (13a tokens, no
smoothing), whose n-gram counts and lengths add up over clients.
"""

import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from weft.core.metrics import added
from weft.core.types import Example, Metrics, Probe

ROUGE = ("rouge1", "rouge2", "rougeL")


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
    batch holds prompts of one length only.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i]["prompt"])
    virtual = _virtual(probe.model)
    groups = [list(rows) for _, rows in groupby(order, lambda i: examples[i]["prompt"] if virtual else 0)]
    return [rows[at : at + probe.batch] for rows in groups for at in range(0, len(rows), probe.batch)]


def _virtual(model: Any) -> int:
    """Return how many virtual tokens peft puts in front of each row."""
    return int(model.active_peft_config.num_virtual_tokens) if hasattr(model, "prompt_encoder") else 0


def _continue(probe: Probe, examples: Sequence[Example]) -> list[str]:
    prompts = [example["ids"][: max(1, example["prompt"])] for example in examples]
    longest = max(map(len, prompts))
    pad = probe.tokenizer.pad_token_id
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in prompts]).long()
    device = next(probe.model.parameters()).device
    room = getattr(probe.model.config, "max_position_embeddings", None) or 10**9
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # peft counts from the virtual tokens on
        out = probe.model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(1, min(probe.max_new_tokens, room - longest - _virtual(probe.model))),
            do_sample=False,
            pad_token_id=pad,
        )
    decoded: list[str] = probe.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in decoded]


def score_each(predictions: Sequence[str], references: Sequence[str]) -> list[Metrics]:
    """Return what each pair adds to ROUGE and to the corpus BLEU."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    scorer, corpus = RougeScorer(list(ROUGE), use_stemmer=True), BLEU(smooth_method="none")
    rows: list[Metrics] = []
    for text, reference in zip(predictions, references, strict=True):
        found = scorer.score(reference, text)
        bleu = corpus.corpus_score([text], [[reference]])
        counts = {f"bleu.match{n}": bleu.counts[n - 1] for n in range(1, 5)}
        totals = {f"bleu.total{n}": bleu.totals[n - 1] for n in range(1, 5)}
        lengths = {"bleu.output": bleu.sys_len, "bleu.reference": bleu.ref_len}
        sums = {k: float(v) for k, v in (counts | totals | lengths).items()}
        rows.append({"generated": 1.0} | {name: found[name].fmeasure for name in ROUGE} | sums)
    return rows


def score(predictions: Sequence[str], references: Sequence[str]) -> Metrics:
    """Return the sums behind ROUGE and BLEU."""
    return added(score_each(predictions, references))


def text_rows(probe: Probe, examples: Sequence[Example]) -> list[Metrics]:
    """Generate an answer to each example and return what it adds to the scores."""
    return score_each(generate(probe, examples), [example["reference"] for example in examples])


def text_summary(sums: Metrics) -> Metrics:
    """Return rouge1, rouge2, rougeL and bleu4 (0 to 1) of the sums; empty where nothing was generated."""
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
    return {name: sums[name] / sums["generated"] for name in ROUGE} | {"bleu4": bleu.score / 100}
