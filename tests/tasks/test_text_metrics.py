"""ROUGE and BLEU beside the libraries that define them, pooled from halves; generation whatever the batch."""

import random

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from weft.core.task import Example, Probe
from weft.core.types import Metrics
from weft.tasks.text_metrics import ROUGE, generate, score, text_summary
from weft.testing.tiny import model, tokenizer


def pairs(count: int = 30) -> tuple[list[str], list[str]]:
    """Return predictions that are references with words left out, swapped or added."""
    draw = random.Random(7)
    words = ["the", "fever", "falls", "when", "patients", "drink", "more", "water,", "and", "noses", "run."]
    predictions, references = [], []
    for _ in range(count):
        reference = [draw.choice(words) for _ in range(draw.randint(4, 16))]
        kept = [word for word in reference if draw.random() > 0.15]
        kept.insert(draw.randint(0, len(kept)), draw.choice(words))
        predictions.append(" ".join(kept))
        references.append(" ".join(reference))
    return predictions, references


def expected() -> Metrics:
    predictions, references = pairs()
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    bleu = BLEU(smooth_method="none").corpus_score(predictions, [references])
    assert bleu.score > 10
    means = {name: sum(row[name].fmeasure for row in rows) / 30 for name in ROUGE}
    same = sum(text == reference for text, reference in zip(predictions, references, strict=True)) / 30
    return means | {"bleu4": bleu.score / 100, "exact_match": same}


def added(*parts: Metrics) -> Metrics:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


@pytest.mark.parametrize("cut", [1, 15, 29])
def test_pooled_scores_are_those_of_the_libraries(cut: int) -> None:
    predictions, references = pairs()
    halves = added(score(predictions[:cut], references[:cut]), score(predictions[cut:], references[cut:]))
    assert text_summary(score(predictions, references)) == pytest.approx(expected(), rel=1e-12)
    assert text_summary(halves) == pytest.approx(expected(), rel=1e-12)


def test_two_hundred_pairs_are_those_of_the_libraries() -> None:
    """ROUGE of rouge_score, BLEU of sacrebleu and, written by others, of nltk on the same tokens."""
    from nltk.translate.bleu_score import corpus_bleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    predictions, references = pairs(200)
    found = text_summary(score(predictions, references))
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    for name in ROUGE:
        each = [scorer.score(r, p)[name].fmeasure for r, p in zip(references, predictions, strict=True)]
        assert found[name] == pytest.approx(sum(each) / 200, rel=1e-12)
    whole = BLEU(smooth_method="none").corpus_score(predictions, [references]).score / 100
    split = Tokenizer13a()
    other = corpus_bleu([[split(r).split()] for r in references], [split(p).split() for p in predictions])
    assert found["bleu4"] == pytest.approx(whole, rel=1e-12)
    assert found["bleu4"] == pytest.approx(other, rel=1e-9)
    assert found["bleu4"] > 0.1


def test_a_mean_of_means_is_something_else() -> None:
    """The negative control: BLEU of unequal parts averaged is not BLEU of the whole."""
    predictions, references = pairs()
    parts = [text_summary(score(predictions[a:b], references[a:b]))["bleu4"] for a, b in ((0, 5), (5, 30))]
    assert sum(parts) / 2 != pytest.approx(expected()["bleu4"], rel=1e-3)


def test_equal_and_unlike_texts() -> None:
    same = text_summary(score(["a b c d e"], ["a b c d e"]))
    assert same == pytest.approx({"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "bleu4": 1.0, "exact_match": 1.0})
    other = text_summary(score(["v w x y z"], ["a b c d e"]))
    assert set(other.values()) == {0.0}
    assert set(text_summary(score([""], ["a b c d e"])).values()) == {0.0}


def test_exact_match_by_hand() -> None:
    """Two of four are their references; white space at the ends is nothing, letters of another case are something."""
    found = score(["a b", " c ", "D", "e f"], ["a b", "c", "d", "e  f"])
    assert text_summary(found)["exact_match"] == 0.5


# Articles 1 to 3 of the Universal Declaration of Human Rights, and the same with words left out, swapped or added.
CHINESE = [
    (
        "人人生来自由,在尊严和权利上平等。他们有理性和良心,应以兄弟关系的精神对待。",
        "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    ),
    (
        "人人有资格享有本宣言的权利和自由,不分种族、性别、语言或财产。",
        "人人有资格享有本宣言所载的一切权利和自由,不分种族、肤色、性别、语言、宗教、财产、出生或其他身份等任何区别。",
    ),
    ("人人都有生命、自由和安全的权利 UDHR 3", "人人有权享有生命、自由和人身安全 UDHR 3。"),
]


def test_chinese_scores_are_those_of_the_libraries() -> None:
    """BLEU is sacrebleu's with its zh tokens. ROUGE is rouge_score's own over English words, one for each token."""
    predictions, references = map(list, zip(*CHINESE, strict=True))
    found = text_summary(score(predictions, references, "zh"))
    assert (
        found["bleu4"] == BLEU(smooth_method="none", tokenize="zh").corpus_score(predictions, [references]).score / 100
    )
    cut = BLEU(tokenize="zh").tokenizer
    letters: dict[str, str] = {}

    def renamed(text: str) -> str:
        return " ".join(letters.setdefault(token, f"w{len(letters)}") for token in cut(text).split())

    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    rows = [scorer.score(renamed(reference), renamed(text)) for text, reference in CHINESE]
    for name in ROUGE:
        assert found[name] == pytest.approx(sum(row[name].fmeasure for row in rows) / 3, rel=1e-12)
        assert 0.3 < found[name] < 0.95
    halves = added(score(predictions[:1], references[:1], "zh"), score(predictions[1:], references[1:], "zh"))
    assert text_summary(halves) == pytest.approx(found, rel=1e-12)


def test_chinese_by_hand_and_as_english() -> None:
    """Characters 我 爱 你 against 我 爱 他: 2 of 3, one of two pairs, 2 of 3. English tokens see no letter of it."""
    found = text_summary(score(["我爱你"], ["我爱他"], "zh"))
    assert [found[name] for name in ROUGE] == pytest.approx([2 / 3, 1 / 2, 2 / 3])
    assert text_summary(score(["我爱你"], ["我爱他"]))["rouge1"] == 0


def test_nothing_generated_has_no_scores() -> None:
    assert text_summary({"nll": 1.0}) == {}
    assert text_summary({"generated": 0.0}) == {}


def test_rouge_by_hand() -> None:
    """Words a b c against a b d: 2 of 3 shared, so 2/3; one of two pairs, so 1/2; the longest row a b, so 2/3."""
    found = text_summary(score(["a b c"], ["a b d"]))
    assert [found[name] for name in ROUGE] == pytest.approx([2 / 3, 1 / 2, 2 / 3])


def test_texts_do_not_depend_on_the_batch_and_come_in_order() -> None:
    words = tokenizer()
    prompts = ["what is bread", "a", "the rain costs", "card 7"]
    examples: list[Example] = []
    for text in prompts:
        ids = torch.tensor(words(text, add_special_tokens=False)["input_ids"])
        examples.append({"ids": torch.cat([ids, torch.tensor([50, 51])]), "prompt": len(ids)})
    net = model()
    alone, together = (generate(Probe(net, words, batch, 5, None), examples) for batch in (1, 4))
    assert alone == together
    ids = examples[0]["ids"][: examples[0]["prompt"]][None]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, net(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert together[0] == words.decode(ids[0, len(prompts[0]) :], skip_special_tokens=True).strip()
