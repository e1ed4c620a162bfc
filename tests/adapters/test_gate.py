"""An adapter folder that is wrong in any way is refused in one sentence; a sound one loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import weft
from tests.conftest import EXAMPLES
from weft.adapters.gate import checked
from weft.core.errors import JobError

BASE = EXAMPLES / "models" / "stories260K"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(folder)
    return folder


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return changed


def first(held: dict[str, torch.Tensor]) -> str:
    return min(held)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "is no adapter"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "is no adapter"),
    "config too large": (
        lambda f: (f / "adapter_config.json").write_text("{" + " " * 1_000_001 + "}"),
        "is no adapter",
    ),
    "deep config": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "is no adapter"),
    "unknown kind": (config(peft_type="EVIL"), "does not fit this model"),
    "kind is a number": (config(peft_type=3), "is no adapter"),
    "alpha is not finite": (config(lora_alpha=float("nan")), "lora_alpha is not a finite number"),
    "alpha is huge": (config(lora_alpha=1e30), "lora_alpha must be a number from 1 to 65536"),
    "rank 0": (config(r=0), "r must be a number from 1 to 65536"),
    "rank is true": (config(r=True), "r must be a number"),
    "a pattern that runs for ever": (config(target_modules="(([a-z_.0-9])+)+!"), "names of modules, not patterns"),
    "a pattern in a list": (config(target_modules=["q.*|k.*"]), "names of modules, not patterns"),
    "a pattern of ranks": (config(rank_pattern={"(a+)+!": 4}), "must map names of modules"),
    "another rank": (config(r=4), "does not fit this model"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "pickled weights": (pickled, "has no adapter_model.safetensors; other formats can run code"),
    "cut weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x08\x00"), "is damaged"),
    "a NaN": (tensors(lambda h: h[first(h)].view(-1)[0].fill_(float("nan"))), "must hold finite"),
    "whole numbers": (tensors(lambda h: h.update({first(h): torch.ones(2, 2, dtype=torch.int64)})), "must hold finite"),
    "a tensor is missing": (tensors(lambda h: h.pop(first(h))), "does not fit this model"),
    "a tensor too many": (tensors(lambda h: h.update({"extra": torch.ones(2)})), "holds extra, which nothing"),
    "another shape": (tensors(lambda h: h.update({first(h): torch.ones(3, 3)})), "does not fit this model"),
}


@pytest.mark.parametrize(("damage", "words"), BAD.values(), ids=BAD)
def test_a_wrong_folder_is_refused(
    damage: Callable[[Path], object],
    words: str,
    sound: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    folder = shutil.copytree(sound, tmp_path / "a")
    damage(folder)
    with pytest.raises(JobError, match=words) as caught:
        weft.load_adapter(AutoModelForCausalLM.from_pretrained(BASE), folder)
    record_property("said", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_sound_folder_passes(sound: Path) -> None:
    assert checked(sound)["peft_type"] == "LORA"
    weft.load_adapter(AutoModelForCausalLM.from_pretrained(BASE), sound)


def test_a_base_that_a_config_names_is_not_followed(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "a")
    config(base_model_name_or_path="/nowhere/else", revision="evil")(folder)
    weft.load_adapter(AutoModelForCausalLM.from_pretrained(BASE), folder)
