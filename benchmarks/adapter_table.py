"""Write docs/adapters.md: every adapter on every model family and task, run on tiny models with random weights."""

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from weft import plugins
from weft.core.task import Task
from weft.tasks.causal_lm import causal_lm
from weft.tasks.classification import classification
from weft.tasks.image_classification import image_classification
from weft.tasks.image_text import image_text
from weft.tasks.preference import preference
from weft.tasks.seq2seq import seq2seq
from weft.testing.families import FAMILIES, FAMILIES_OF, Cell, cell
from weft.testing.rounds import two_rounds

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 2, "targets": "all-linear"}),
    "dora": ("lora", {"rank": 2, "targets": "all-linear", "dora": True}),
    "pissa": ("lora", {"rank": 2, "targets": "all-linear", "init": "pissa"}),
    "ia3": ("ia3", {}),
    "bottleneck": ("bottleneck", {"size": 4}),
    "prompt": ("prompt", {"tokens": 3}),
    "ptuning mlp": ("ptuning", {"tokens": 3, "hidden": 8}),
    "ptuning lstm": ("ptuning", {"tokens": 3, "hidden": 8, "encoder": "lstm"}),
    "prefix": ("prefix", {"tokens": 3}),
    "prefix projected": ("prefix", {"tokens": 3, "projection": True}),
    "bitfit": ("bitfit", {}),
    "full": ("full", {}),
}
"""Column -> the adapter and its keys."""
TASKS: dict[str, Callable[[], Task]] = {
    "causal_lm": lambda: causal_lm(max_length=48),
    "classification": lambda: classification(max_length=48),
    "seq2seq": lambda: seq2seq(max_length=48),
    "preference": lambda: preference(max_length=48),
    "image_classification": image_classification,
    "image_text": lambda: image_text(max_length=48),
}
HEAD = """# Adapters

An adapter is what is trained, sent and averaged; the rest of the model stays as it is. `weft explain NAME` prints the
keys of each. This page is written by `benchmarks/adapter_table.py`, and a test compares it with what the code does.

| adapter | what is trained | merges into the base |
|---|---|---|
{methods}

The head of a classifier, of texts or pictures, is new for every task. With every adapter it is trained, sent, averaged
and saved. In a model of pictures and captions both towers are adapted, and the temperature stays the base's.

## The folder

A run writes `adapter/adapter_config.json` and `adapter/adapter_model.safetensors`. For lora, ia3, prompt, ptuning and
prefix, `PeftModel.from_pretrained(base, folder)` reads them without Weft. ptuning and projected prefixes are saved as
the embeddings, or keys and values, that their networks compute. A pissa adapter is saved as a plain one of twice the
rank. `bottleneck` is a tuner that Weft adds to peft; `bitfit` and `full` hold parameters under the base's own names.
`weft.load_adapter(model, folder)` reads all of them.

## Where it runs

Each cell was run on a tiny model with random weights: the adapter is put on, trained tensors are moved, saved and
read again into a plain model (outputs equal to 1e-5), and two clients with unlike examples go through the model in
one block (gradients equal to one example at a time, to 1e-7 in float64). Then three clients train two federated
rounds: the loss falls, and what travels is every trained tensor and no other.

- **packed**: the examples of all clients stand in one row, without padding
- **padded**: the examples of all clients are rows of one batch
- **single**: clients are trained one by one, for the reason in the note
- **refused**: the job stops before training, with the sentence in the note
"""


@cache
def rounds(method: str, task: str, family: str) -> tuple[float, float]:
    """Train two federated rounds in a cell; return the loss before and after."""
    name, keys = METHODS[method]
    adapter = plugins.build(plugins.parse("adapter", {name: keys}), "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return two_rounds(adapter, TASKS[task](), family)


def train_all() -> None:
    """Train every cell that is not refused; raise AssertionError where the loss does not fall."""
    for task in TASKS:
        for family in FAMILIES_OF.get(task, FAMILIES):
            cells = [method for method in METHODS if run(method, task, family).mode]
            for method in cells:
                before, after = rounds(method, task, family)
                assert after < before, f"{method}, {task}, {family}: the loss went from {before:.4f} to {after:.4f}"
            sys.stdout.write(f"{task}, {family}: two rounds of {len(cells)} adapters\n")


@cache
def run(method: str, task: str, family: str) -> Cell:
    """Run one cell."""
    name, keys = METHODS[method]
    adapter = plugins.build(plugins.parse("adapter", {name: keys}), "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cell(adapter, TASKS[task](), family)


def text() -> str:
    """Return the page."""
    notes: list[str] = []
    parts = [HEAD.format(methods="\n".join(_methods()))]
    for task in TASKS:
        parts.append(f"### {task}\n\n" + "\n".join(_table(task, notes)) + "\n")
    parts.append("\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)) + "\n")
    return "\n".join(parts)


def _methods() -> list[str]:
    rows = []
    for name in dict.fromkeys(adapter for adapter, _ in METHODS.values()):
        first = (inspect.getdoc(import_module(f"weft.adapters.{name}")) or "").split("\n\n")[0]
        merges = plugins.build(plugins.parse("adapter", name), "adapter").mergeable
        rows.append(f"| `{name}` | {' '.join(first.split()).partition(': ')[2]} | {'yes' if merges else 'no'} |")
    return rows


def _table(task: str, notes: list[str]) -> list[str]:
    rows = [f"| | {' | '.join(METHODS)} |", "|---|" + "---|" * len(METHODS)]
    for family in FAMILIES_OF.get(task, FAMILIES):
        cells = [_shown(run(method, task, family), notes) for method in METHODS]
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return rows


def _shown(found: Cell, notes: list[str]) -> str:
    word = found.mode or "refused"
    if not found.reason:
        return word
    reason = re.sub(r"\w+For(CausalLM|SequenceClassification|ConditionalGeneration)\b(?!:)", "the model", found.reason)
    reason = re.sub(r"^model\.name: \w+ ", "model.name: it ", reason).partition(": Unrecognized")[0]
    if reason not in notes:
        notes.append(reason)
    return f"{word} [{notes.index(reason) + 1}]"


if __name__ == "__main__":
    torch.set_num_threads(1)  # many threads on tiny tensors only wait for each other
    train_all()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text(), encoding="utf8")
    sys.stdout.write(f"wrote {PAGE}\n")
