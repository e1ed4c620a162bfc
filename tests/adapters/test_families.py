"""Every adapter on every model family and task, and the page that says so."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.adapters.lora import lora
from weft.adapters.prompt import prompt
from weft.core.errors import JobError
from weft.core.types import Order, Parcel
from weft.site.lift import Lift
from weft.site.site import Site
from weft.tasks import classification as labels
from weft.tasks.causal_lm import causal_lm
from weft.tasks.classification import classification
from weft.testing.families import (
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    FAMILIES,
    FAMILIES_OF,
    cell,
    double,
    equipped,
    mode_of,
    tiny,
)
from weft.testing.rounds import two_rounds

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "adapter_table.py"
TABLE = runpy.run_path(str(SCRIPT))
PACKED = ("llama", "qwen2", "qwen3", "phi3", "gpt2", "glm", "opt")
VIRTUAL = ("prompt", "ptuning mlp", "ptuning lstm", "prefix", "prefix projected")
WITHOUT_BIASES = ("llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3_text", "t5")
ALONE = ("full", "clip")  # its text tower asks a trained table, which has a client axis in a block, for its length


def expected(method: str, task: str, family: str) -> str:
    """Return the mode that a cell must have, or what its refusal must say."""
    if task.startswith("image"):
        return "gives the model pictures" if method in VIRTUAL else "single" if (method, family) == ALONE else "padded"
    if task == "seq2seq" and family not in ENCODER_DECODERS:
        return "cannot be loaded as AutoModelForSeq2SeqLM"
    if task in ("causal_lm", "preference") and family in (*ENCODERS, "t5"):
        return "cannot be loaded as" if family in ("distilbert", "t5") else "is an encoder, which"
    if task == "classification" and family in ENCODER_DECODERS:
        return "is an encoder-decoder; classification needs"
    if method == "bitfit" and family in WITHOUT_BIASES:
        return "has none; take `ia3`"
    if task == "seq2seq" and method == "full":
        return "single"  # T5's distances and BART's positions are read once for all rows
    if method.startswith("prefix") and (family == "distilbert" or (family == "bart" and task != "seq2seq")):
        return "takes no keys and values from outside"
    packed = family in (*PACKED, *ENCODERS) and method not in VIRTUAL
    if (method, family) == ("full", "bart"):
        return "single"
    return "packed" if packed and (method, family) != ("full", "opt") else "padded"


@pytest.mark.parametrize("task", list(TABLE["TASKS"]))
@pytest.mark.parametrize("method", list(TABLE["METHODS"]))
def test_every_family(method: str, task: str) -> None:
    """Outputs survive the folder and blocks have each example's own gradients; `cell` asserts both."""
    for family in FAMILIES_OF.get(task, FAMILIES):
        found, wanted = TABLE["run"](method, task, family), expected(method, task, family)
        assert wanted in (found.mode or found.reason), f"{family}: {found}"


PAIRS = [
    (method, task, families[place % len(families)])
    for task, families in (
        ("causal_lm", DECODERS),
        ("classification", DECODERS + ENCODERS),
        ("preference", DECODERS[::-1]),
        ("seq2seq", ENCODER_DECODERS),
        *FAMILIES_OF.items(),
    )
    for place, method in enumerate(TABLE["METHODS"])
]
"""Each method on one family of each task; the script that writes the page trains them all."""


@pytest.mark.parametrize(("method", "task", "family"), PAIRS)
def test_two_rounds_of_three_clients(method: str, task: str, family: str) -> None:
    """The loss falls, and what travels is every trained tensor and no other; refused cells are refused here too."""
    if TABLE["run"](method, task, family).mode is None:
        with pytest.raises(JobError):
            TABLE["rounds"](method, task, family)
        return
    before, after = TABLE["rounds"](method, task, family)
    assert after < before


def test_the_page_is_current() -> None:
    assert TABLE["PAGE"].read_text(encoding="utf8") == TABLE["text"](), f"run python {SCRIPT}"


# --- controls


def test_labels_at_the_wrong_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's head that reads the last position, padding or not: blocks differ from one example at a time."""
    from contextlib import nullcontext

    monkeypatch.setattr(labels, "_last", lambda model, mask: nullcontext())
    found = mode_of(double(equipped(prompt(tokens=3), classification(), "llama")), classification())
    assert found.mode == "single"
    assert "padded: a gradient differs by" in found.reason


def test_one_prompt_for_all_clients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    task = causal_lm(max_length=48)
    loaded = double(equipped(prompt(tokens=3), task, "llama"))
    whole = Lift._prompt

    def first_only(self: Lift, batch_size: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return whole(self, batch_size)[:1].expand(batch_size, -1, -1)

    monkeypatch.setattr(Lift, "_prompt", first_only)
    assert mode_of(loaded, task).mode == "single"


def test_a_folder_that_holds_something_else_is_found() -> None:
    adapter = lora(rank=2)
    broken = replace(adapter, saved=lambda tensors, first, config: (first, config))
    with pytest.raises(AssertionError, match="after the adapter went through its folder"):
        cell(broken, causal_lm(max_length=48), "llama")


def test_a_head_that_stays_behind_is_found() -> None:
    def attach(base: Any, peft_type: str, seed: int) -> Any:
        net = lora(rank=2).attach(base, peft_type, seed)
        for name, p in net.named_parameters():
            if "modules_to_save" in name:
                p.requires_grad_(False)
        return net

    with pytest.raises(AssertionError, match=r"of the head, .*score"):
        cell(replace(lora(rank=2), attach=attach), classification(), "llama")


def test_a_tensor_that_does_not_travel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Site._reply

    def without_one(self: Site, order: Order, client: str, parcel: Parcel, losses: torch.Tensor) -> Any:
        _, *others = parcel.update["adapter"]
        cut = {"adapter": {name: parcel.update["adapter"][name] for name in others}}
        return whole(self, order, client, replace(parcel, update=cut), losses)

    monkeypatch.setattr(Site, "_reply", without_one)
    with pytest.raises(AssertionError, match="what travels is not what is trained"):
        two_rounds(lora(rank=2), causal_lm(max_length=48), "llama")


def test_the_tiny_models_stay_as_they_were() -> None:
    """Cells work on copies: the cached models give the same bits however often they were used."""
    model: Any = tiny("gpt2", "AutoModelForCausalLM")
    before = {name: p.clone() for name, p in model.named_parameters()}
    cell(lora(rank=2, init="pissa"), causal_lm(max_length=48), "gpt2")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
