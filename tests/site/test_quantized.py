"""Quantised bases: refused where there is no bitsandbytes; else trained in blocks, resumed, asked, and never merged."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft import Job
from weft.ask import ask
from weft.core.errors import JobError
from weft.export import export
from weft.prepare import prepare, set_up
from weft.site import quantized

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_machine_without_bitsandbytes(values: dict[str, Any], bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    values["model"]["quantize"] = bits
    with pytest.raises(JobError, match=r"^model\.quantize: needs bitsandbytes, .*weft-fl\[quantize\]"):
        prepare(Job(**values))


def test_random_weights_are_refused(values: dict[str, Any]) -> None:
    values["model"] |= {"quantize": "4bit", "random": True}
    with pytest.raises(JobError, match=r"^model\.quantize: random weights"):
        prepare(Job(**values))


def test_merging_is_refused(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = weft.run(Job(**values), tmp_path / "run")
    text = (run.folder / "job.yaml").read_text(encoding="utf8")
    (run.folder / "job.yaml").write_text(text.replace("quantize: null", "quantize: 4bit"), encoding="utf8")
    with pytest.raises(JobError, match="--merge: the base is quantised"):
        export(run, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


@installed
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_whole_run(values: dict[str, Any], bits: str, tmp_path: Path) -> None:
    """The base holds small integers, clients train in one block, the loss falls, and plain peft reads the adapter."""
    values["model"]["quantize"] = bits
    bench = set_up(prepare(Job(**values)))
    kinds = {p.dtype for name, p in bench.loaded.net.named_parameters() if "base_layer" in name}
    assert kinds == {torch.int8 if bits == "8bit" else torch.uint8}
    assert bench.mode != "single"
    assert {p.dtype for p in bench.loaded.initial.values()} == {torch.float32}
    run = weft.run(Job(**values), tmp_path / "run")
    before, after = (run.results["methods"][name]["overall"]["loss"] for name in ("untrained", "federated"))
    assert after < before
    assert set(ask(run, "What is gout?", 4)) == {"untrained base", "federated"}


@installed
@pytest.mark.parametrize("adapter", [{"full": None}, {"lora": {"rank": 2, "init": "pissa"}}], ids=["full", "pissa"])
def test_what_needs_the_weights_themselves_is_refused(values: dict[str, Any], adapter: dict[str, Any]) -> None:
    values["model"]["quantize"] = "4bit"
    values["adapter"] = adapter
    with pytest.raises(JobError, match=r"quantised|peft cannot put it on"):
        set_up(prepare(Job(**values)))


@installed
@pytest.mark.parametrize("adapter", ["ia3", "bottleneck", "prompt", "prefix"])
def test_other_adapters(values: dict[str, Any], adapter: str) -> None:
    values["model"]["quantize"] = "4bit"
    values["adapter"] = adapter
    assert set_up(prepare(Job(**values))).mode
