"""A run goes on only with what it began with, and says what is different."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import weft
from tests.conftest import EXAMPLES, write_records
from tests.test_runs import adapter_hash
from weft import Job
from weft.core.errors import PolicyError
from weft.fingerprints import compare, tokenizer_print
from weft.watch import Watch

FACTS = {"fingerprint": "b", "tokenizer": "t", "train": "x", "test": "y", "versions": {"torch": "2.13"}}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("fingerprint", "the base model or its vocabulary"),
        ("tokenizer", "how the tokenizer divides a text"),
        ("train", "the training data"),
        ("test", "the test data"),
    ],
)
def test_what_changed_is_named(key: str, said: str) -> None:
    with pytest.raises(PolicyError, match=f"run: {said} changed since this run began; put it back"):
        compare(FACTS, {**FACTS, key: "other"}, Path("run"))
    assert compare(FACTS, FACTS, Path("run")) == []


def test_another_version_is_a_notice() -> None:
    (notice,) = compare(FACTS, {**FACTS, "versions": {"torch": "2.14"}}, Path("run"))
    assert notice.startswith("torch is 2.14 and was 2.13 when this run began")


def test_a_tokenizer_that_divides_otherwise_has_another_print() -> None:
    folder = EXAMPLES / "models" / "stories260K"
    first, second = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer_print(first) == tokenizer_print(second)
    second.add_tokens(["patients"])
    assert tokenizer_print(first) != tokenizer_print(second)
    third = AutoTokenizer.from_pretrained(folder)
    third.chat_template = "{{ messages[0].content }}"
    assert tokenizer_print(first) != tokenizer_print(third)


def test_data_that_changed_is_refused_on_resume_and_the_run_stays(values: dict[str, Any], tmp_path: Path) -> None:
    values["rounds"], values["baselines"] = 1, []
    run = weft.run(Job(**values), tmp_path / "run")
    before = adapter_hash(run)
    write_records(tmp_path / "train.jsonl", 14, offset=1)
    with pytest.raises(PolicyError, match="the training data changed since this run began"):
        weft.run(Job(**values), tmp_path / "run", resume=True)
    assert adapter_hash(weft.Run(tmp_path / "run")) == before


def test_another_library_is_told_on_resume(values: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Watch):
        def notice(self, text: str) -> None:
            said.append(text)

    values["rounds"], values["baselines"] = 1, []
    weft.run(Job(**values), tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "base.json").read_text())
    facts["versions"]["peft"] = "0.1"
    (tmp_path / "run" / "base.json").write_text(json.dumps(facts))
    weft.run(Job(**values), tmp_path / "run", resume=True, watch=Listening())
    assert any(text.startswith("peft is ") and "was 0.1" in text for text in said)
