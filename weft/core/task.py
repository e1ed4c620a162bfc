"""What is learned: the types of a task, from records to metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from weft.core.types import Metrics

Example = dict[str, Any]
"""One encoded record: 1-d integer tensors, and what the metrics need beside them."""

Batch = dict[str, Any]
"""Tensors for the model, the rows of one client beside each other, and `counts`: labels of each client, in order.

`own` where an example is more than one row of its `ids`: each client's own rows and longest row.
"""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoded records of one client, with what truncation did to them."""

    examples: Sequence[Example]
    truncated: int = 0
    dropped: int = 0
    """Records with nothing left to learn from once they were cut."""


def _tokens(example: Example) -> int:
    return len(example["ids"])


@dataclass(frozen=True)
class Task:
    """What is learned: records -> examples -> batch -> loss -> metrics."""

    auto: str
    """The transformers class that loads the model, such as AutoModelForCausalLM."""
    peft_type: str
    """peft's kind of model; FEATURE_EXTRACTION: none, so the adapter is a plain PeftModel with the new head, if any."""
    needs: tuple[tuple[str, ...], ...]
    """Alternative sets of columns; a record has one of them complete."""
    metrics: tuple[str, ...]
    classes: Callable[[Sequence[Mapping[str, Any]]], tuple[str, ...]]
    """The label set of the training records; empty where the task has none."""
    encode: Callable[[Any, Sequence[Mapping[str, Any]], tuple[str, ...]], Encoded]
    """(tokenizer, records, classes) -> examples; with pictures, a `Processor` stands for the tokenizer."""
    collate: Callable[[Sequence[Sequence[Example]], int], Batch]
    """(examples of each client, pad id) -> batch padded on the right, equally many rows a client (fillers count 0)."""
    loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    """(model, batch) -> per client the summed loss and what it is summed over, both (clients,)."""
    shorten: Callable[[Example, int], Example]
    """(example, tokens) -> the example cut to at most so many tokens, with something left to learn."""
    measure: Callable[["Probe", Sequence[Example], tuple[str, ...]], Metrics]
    """Sums over test examples for the metrics asked for."""
    summarize: Callable[[Metrics], Metrics]
    """Sums -> metrics, such as perplexity."""
    each: Callable[["Probe", Sequence[Example], tuple[str, ...]], list[Metrics]] | None = None
    """What `measure` adds up, one row a test example in order; None: the task knows the sums alone."""
    pack: Callable[[Sequence[Sequence[Example]]], Batch] | None = None
    """Examples of each client -> one row without padding; `tokens` of each client, `lengths` of each example."""
    per_example: bool = True
    """An example's loss does not depend on the others of its batch, so that it has a gradient of its own."""
    refer: Callable[[nn.Module, Sequence[Example], int, int], list[Example]] | None = None
    """(base without an adapter, examples of one client, pad id, batch) -> the examples with what the loss asks of the
    base. It never changes, so this is done once, and again after a restart: the same bits."""
    reads: tuple[Literal["text", "images"], ...] = ("text",)
    """What records hold: text asks for the base's tokenizer, images for its image processor."""
    length: Callable[[Example], int] = _tokens
    """Tokens of an example in the model, by which alike examples share a step."""
    least: int = 1
    """Fewest examples of a mini-batch that there is something to learn from: 2 where they are compared."""
    frozen: tuple[str, ...] = ()
    """Last names of parameters that stay as the base has them, whatever the adapter trains."""


@dataclass(frozen=True)
class Probe:
    """What a task measures with: the model as a client uses it, and the settings of the evaluation."""

    model: nn.Module
    tokenizer: Any
    batch: int
    max_new_tokens: int
    generated: int | None
    """Most examples that text is generated for."""
