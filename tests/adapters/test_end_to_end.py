"""Whole runs with each adapter: train, resume-free, export, ask, load."""

from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft import Job
from weft.ask import ask
from weft.core.errors import JobError
from weft.export import export

ADAPTERS: list[dict[str, Any]] = [
    {"lora": {"rank": 2, "dora": True}},
    {"lora": {"rank": 2, "init": "pissa"}},
    {"ia3": None},
    {"bottleneck": {"size": 4}},
    {"prompt": {"tokens": 4, "init_text": "answer the question"}},
    {"ptuning": {"tokens": 4, "encoder": "lstm", "hidden": 8}},
    {"prefix": {"tokens": 4, "projection": True}},
    {"full": None},
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=[next(iter(a)) for a in ADAPTERS])
def test_a_whole_run(values: dict[str, Any], adapter: dict[str, Any], tmp_path: Path) -> None:
    values["adapter"] = adapter
    values["evaluate"] = {"on": ["loss", "rouge"], "examples": 2, "max_new_tokens": 4}
    values["rounds"] = 2
    job = Job(**values)
    run = weft.run(job, tmp_path / "run")
    answers = ask(run, "What is gout?", 6)
    assert set(answers) == {"untrained base", "federated"}
    base, tokenizer = run.base()
    ids = torch.tensor([tokenizer("What is gout?")["input_ids"]])
    with torch.no_grad():
        loaded = weft.load_adapter(base, run.folder / "adapter")(
            input_ids=ids, attention_mask=torch.ones_like(ids)
        ).logits
    if next(iter(adapter)) in ("lora", "ia3", "full"):
        export(run, tmp_path / "merged", merge=True)
        import transformers

        with torch.no_grad():
            merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        assert torch.allclose(merged, loaded[:, -ids.shape[1] :], atol=1e-4)
    else:
        with pytest.raises(JobError, match="cannot be merged"):
            export(run, tmp_path / "merged", merge=True)
