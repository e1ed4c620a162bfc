"""Do blocks of 2, 4 and 16 clients end where the clients end that are trained one by one?

    python benchmarks/engine_parity.py [--adapters lora dora]

Tiny models with random weights, AdamW (lr 1e-3) with a clip of 0.05, up to ten local steps; clients of 3 to 20
examples of unlike length, so 2 to 10 steps; low-rank adapters with 1 to 4 ranks inside one block. Two references, one
client after another: the plain model, padded to the client's own rows, and in float32 also blocks of one, as
`--block 1` trains. With dropout it is the blocks of one alone, since a packed row draws its masks otherwise than a
padded one. Two tables: every adapter, task and family in blocks of 4 in float64; every adapter with causal_lm, and lora
with every task, in blocks of 2, 4 and 16 in float64 and float32. transformers rounds norms and softmax to float32
inside a float64 model; `unrounded` takes that out, here alone, so that 1e-9 tells a coupling from a rounding. And
controls: what must differ, differs. Writes benchmarks/results/engine_parity.md.
"""

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from weft import plugins
from weft.core import low_rank
from weft.core.errors import JobError
from weft.core.task import Example, Task
from weft.core.types import Tensors
from weft.site import optimizers
from weft.site.cohort import Cohort, Mode
from weft.site.lanes import Lanes
from weft.site.model import Loaded
from weft.site.recipe import Recipe
from weft.tasks.causal_lm import causal_lm
from weft.tasks.classification import classification
from weft.tasks.image_classification import image_classification
from weft.tasks.image_text import image_text
from weft.tasks.preference import preference
from weft.tasks.seq2seq import seq2seq
from weft.testing import families
from weft.testing.families import CLASSES, FAMILIES, FAMILIES_OF, double, equipped, mode_of
from weft.testing.tiny import RECORDS

families.OWN["mistral"] |= {"sliding_window": 64}  # with 16 the answers of long rows would see no virtual token
WHOLE = {"intermediate_size": 32}
"""Of llama: as real ones a multiple of a vector's length; torch computes what is left over otherwise, and rounds so."""
PAGE = Path(__file__).parent / "results/engine_parity.md"
RANKS = 4
LOW = {"rank": RANKS, "targets": "all-linear"}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", LOW),
    "lora, dropout": ("lora", LOW | {"dropout": 0.1}),
    "dora": ("lora", LOW | {"dora": True}),
    "pissa": ("lora", LOW | {"init": "pissa"}),
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
TASKS: dict[str, Callable[[], Task]] = {
    "causal_lm": lambda: causal_lm(max_length=110),
    "classification": lambda: classification(max_length=110),
    "seq2seq": lambda: seq2seq(max_length=110),
    "preference": lambda: preference(max_length=110),
    "image_classification": image_classification,
    "image_text": lambda: image_text(max_length=110),
}
FIRST = {"seq2seq": "t5"}
"""Task -> its family in the second table; the first that it can be tried on for the others."""
RECIPE = Recipe(
    optimizer="adamw", lr=1e-3, batch=2, accumulate=1, epochs=1, steps=None, schedule="constant", warmup=0.0, clip=0.05,
    weight_decay=0.01, momentum=0.0, moments="reset", checkpointing=False, rounds=1,
)  # fmt: skip
DEBERTA = {"position_buckets": -1, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
Trained = dict[str, Tensors]


@contextmanager
def unrounded() -> Iterator[None]:
    """Let a float64 model stay float64 where transformers goes over to float32 for a moment."""
    to, softmax = Tensor.to, functional.softmax

    def stay(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        down = torch.float32 in args or kwargs.get("dtype") is torch.float32
        return tensor if down and tensor.dtype is torch.float64 else to(tensor, *args, **kwargs)

    def same(tensor: Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        wide = torch.float64 if tensor.dtype is torch.float64 else dtype
        return softmax(tensor, *args, **{**kwargs, "dtype": wide})

    with ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, "to", stay))
        stack.enter_context(patch.object(Tensor, "float", lambda tensor: stay(tensor, torch.float32)))
        stack.enter_context(patch.object(functional, "softmax", same))
        yield


@dataclass
class Case:
    """One adapter on one family and task, with the rows that clients take theirs from."""

    cohort: Cohort
    rows: Sequence[Example]
    mode: Mode
    ranks: bool
    found: dict[str, float] = field(default_factory=dict)

    def clients(self, count: int) -> dict[str, Sequence[Example]]:
        """Return clients with 3 to 20 examples, (9 k) % 17 more than 3 for client k: 2 to 10 steps of 2."""
        batch = self.cohort.recipe.batch
        sizes = [3 + (9 * k) % 17 + (k == 1) for k in range(count)]
        sizes = [size * batch // 2 for size in sizes]
        return {f"c{k:02}": [self.rows[(5 * k + i) % len(self.rows)] for i in range(n)] for k, n in enumerate(sizes)}

    def starts(self, count: int) -> Tensors:
        """Return an adapter of its own for each client, of 1 to 4 ranks where it has ranks."""
        draw = torch.Generator().manual_seed(1)
        stack = {
            name: value.detach() + 0.02 * torch.randn(count, *value.shape, generator=draw).to(value.dtype)
            for name, value in self.cohort.loaded.initial.items()
        }
        own = 1 + torch.arange(count) % RANKS
        return low_rank.limited(stack, own) if self.ranks else stack

    def trained(self, count: int, block: int, *, plain: bool = False, **changes: Any) -> Tensors:
        """Train in blocks; `plain`: the plain model, where no draws depend on the batch's form."""
        mode: Mode = "single" if plain and not self.cohort.lift.dropouts else self.mode
        recipe = replace(self.cohort.recipe, **changes)
        cohort, data, start = replace(self.cohort, mode=mode, recipe=recipe), self.clients(count), self.starts(count)
        names, parts = list(data), []
        for at in range(0, count, block):
            part = {name: data[name] for name in names[at : at + block]}
            rows = {name: value[at : at + block] for name, value in start.items()}
            with unrounded():
                parts.append(cohort.train(1, part, rows, {}, None).params)
        return {name: torch.cat([part[name] for part in parts]) for name in start}


def apart(left: Tensors, right: Tensors) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def case_of(adapter: str, task: str, family: str, wide: bool = True) -> Case | str:
    """Return a case, in float64 where `wide`; a word where there are no blocks."""
    name, keys = ADAPTERS[adapter]
    made = TASKS[task]()
    try:
        loaded = equipped(plugins.build(plugins.parse("adapter", {name: keys}), "adapter"), made, family)
    except JobError:
        return "refused"
    rows = _rows(loaded, made)
    mode = mode_of(double(loaded), made).mode
    if not wide:
        loaded.net.float()
        loaded.initial = {n: at[0][0]._parameters[at[0][1]] for n, at in loaded.places.items()}  # type: ignore[misc]
    elif "images" in made.reads:
        rows = [{**row, "pixels": row["pixels"].double()} for row in rows]
    if mode in (None, "single"):
        return "one by one"
    recipe = replace(RECIPE, batch=2 * made.least if made.least > 1 else 2)
    return Case(Cohort(loaded, made, recipe, 3, mode, loaded.lift), rows, mode, name == "lora")


def _rows(loaded: Loaded, task: Task) -> Sequence[Example]:
    encoded = task.encode(loaded.tokenizer, RECORDS, CLASSES if "Classification" in task.auto else ())
    return loaded.referred(task, encoded.examples, 4)


def compare(case: Case, count: int, sizes: Sequence[int], *, plain: bool = True, **changes: Any) -> float:
    """Return how far blocks end from the plain model, or from blocks of one; padded ranks must still be zero."""
    alone = case.trained(count, 1, plain=plain, **changes)
    ends = [case.trained(count, size, **changes) for size in sizes]
    own = 1 + torch.arange(count) % RANKS
    for end in ends if case.ranks else ():
        assert apart(end, low_rank.limited(end, own)) == 0, "a rank that a client does not have was trained"
    return max(apart(alone, end) for end in ends)


def families_of(task: str) -> Sequence[str]:
    return FAMILIES_OF.get(task, FAMILIES)


def wide_rows(adapters: Sequence[str]) -> list[str]:
    """Return the first table: adapters on every task and family, four clients."""
    lines = []
    for adapter in adapters:
        for task in TASKS:
            kinds: dict[str, list[str]] = {"packed": [], "padded": [], "one by one": [], "refused": []}
            worst, where = 0.0, "-"
            for family in families_of(task):
                case = case_of(adapter, task, family)
                if isinstance(case, str):
                    kinds[case].append(family)
                    continue
                kinds[case.mode].append(family)
                found = compare(case, 4, (4,))
                worst, where = max((worst, where), (found, family))
            if not kinds["packed"] and not kinds["padded"]:
                continue
            counts = " | ".join(str(len(kinds[kind])) for kind in ("packed", "padded"))
            alone = ", ".join(kinds["one by one"]) or "-"
            lines.append(f"| {adapter} | {task} | {counts} | {alone} | {worst:.1e} | {where} |")
            print(lines[-1], flush=True)
    return lines


def deep_rows(adapters: Sequence[str]) -> list[str]:
    """Return the second table: adapters on causal_lm and lora on every task, sixteen clients, both precisions."""
    lines = []
    for adapter, task in [(a, t) for a in adapters for t in TASKS if t == "causal_lm" or a == "lora"]:
        family = FIRST.get(task, families_of(task)[0])
        wide, narrow = case_of(adapter, task, family), case_of(adapter, task, family, wide=False)
        if isinstance(wide, str) or isinstance(narrow, str):
            continue
        bound = RECIPE.lr * 10
        alone, exact = narrow.trained(16, 1, plain=True), wide.trained(16, 1, plain=True)
        floor = max(float((alone[name] - exact[name]).abs().max()) for name in alone) / bound
        company = compare(narrow, 16, (2, 4, 16), plain=False) / bound
        plain, sgd = (compare(narrow, 16, (16,), optimizer=name) / bound for name in ("adamw", "sgd"))
        with patch.object(optimizers, "EPSILON", 1e-3):
            gentle = compare(narrow, 16, (16,)) / bound
        lines.append(
            f"| {adapter} | {task} | {family}, {wide.mode} | {compare(wide, 16, (2, 4, 16)):.1e} | {company:.1e} "
            f"| {plain:.1e} | {floor:.1e} | {gentle:.1e} | {sgd:.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


def global_clip(case: Case) -> float:
    """Clip by one norm of the whole block."""
    norm: Callable[..., Tensor] = Tensor.norm
    right = case.trained(4, 4)

    def whole(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dim") == 1 and kwargs.get("keepdim"):
            return norm(tensor).expand(len(tensor), 1)
        return norm(tensor, *args, **kwargs)

    with patch.object(Tensor, "norm", whole):
        return apart(right, case.trained(4, 4))


def padded_mean(case: Case) -> float:
    """Divide each client's loss by the positions of its padded rows, in place of its own labels."""
    plain: dict[str, Any] = {"optimizer": "sgd", "clip": None}  # clipped, or AdamW's, a gradient forgets its scale
    right, task = case.trained(4, 4, **plain), case.cohort.task

    def mean(net: Any, batch: Any) -> Any:
        total, count = task.loss(net, batch)
        positions = max(len(row["ids"]) for row in case.rows)
        return total, torch.full_like(count, case.cohort.recipe.batch * positions)

    wrong = replace(case, cohort=replace(case.cohort, task=replace(task, loss=mean)))
    return apart(right, wrong.trained(4, 4, **plain))


def shared_positions() -> tuple[str, float]:
    """Cut DeBERTa's one table of positions by client; return what the row guard says, and the gradient's error without.

    Two clients' gradients of summed losses, relative to the largest.
    """
    from weft.site import selfcheck

    families.OWN["deberta-v2"] = DEBERTA
    task = TASKS["classification"]()
    adapter = plugins.build(
        plugins.parse("adapter", {"lora": LOW | {"targets": ["query_proj", "key_proj"]}}), "adapter"
    )
    loaded = double(equipped(adapter, task, "deberta-v2"))
    cohort = Cohort(loaded, task, RECIPE, 0, "padded", loaded.lift)
    ragged = selfcheck._ragged(cohort, _rows(loaded, task))
    right = selfcheck._gradients(replace(cohort, mode="single"), ragged, together=False)
    said = str(selfcheck._differs(cohort, ragged, right))
    blind = patch.multiple(Lanes, split=lambda lanes, x: list(x.chunk(lanes.clients)), padded=lambda lanes, x: True)
    with blind:
        wrong = selfcheck._gradients(cohort, ragged, together=True)
    return said, float((wrong - right).abs().max() / right.abs().max())


def control_rows() -> list[str]:
    """Return the third table: bugs that the comparison finds."""
    case = case_of("lora", "causal_lm", "llama")
    assert isinstance(case, Case)
    said, cut = shared_positions()
    alone = compare(case, 4, (4,))
    return [
        f"| none | {alone:.1e} |",
        f"| one clipping norm for the block | {global_clip(case):.1e} |",
        f"| a client's loss divided by its padded positions (SGD, not clipped) | {padded_mean(case):.1e} |",
        f"| DeBERTa's shared positions cut by client: a gradient, relative; the row guard says: {said} | {cut:.1e} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # peft calls a name that transformers renames
    families.OWN["llama"] = families.OWN["llama"] | WHOLE
    begin = time.process_time()
    controls, wide, deep = control_rows(), wide_rows(options.adapters), deep_rows(options.adapters)
    print(f"{time.process_time() - begin:.0f} CPU seconds")
    rows = kept(options.page, 7) | named(wide)
    deeper = kept(options.page, 9) | named(deep)
    machine = f"{platform.machine()}, one thread of {os.cpu_count()} cores, torch {torch.__version__}"
    options.page.write_text(page(controls, in_order(rows), in_order(deeper), machine), encoding="utf8")


Rows = dict[tuple[str, str], str]


def named(lines: Sequence[str]) -> Rows:
    """Return rows by adapter and task."""
    return {(line[2:].split(" | ")[0], line.split(" | ")[1]): line for line in lines}


def kept(page: Path, cells: int) -> Rows:
    """Return the rows with so many cells that a page has already."""
    lines = page.read_text(encoding="utf8").splitlines() if page.exists() else []
    return named([line for line in lines if line.startswith("| ") and line.count("|") == cells + 1][1:])


def in_order(rows: Rows) -> list[str]:
    return [rows[key] for adapter in ADAPTERS for task in TASKS if (key := (adapter, task)) in rows]


def page(controls: list[str], wide: list[str], deep: list[str], machine: str) -> str:
    usage = "\n".join(__doc__.splitlines()[4:12])
    missing = ", ".join(name for name in ADAPTERS if not any(line.startswith(f"| {name} |") for line in wide))
    usage += f"\n\nNot measured in this table: {missing}." if missing else ""
    return f"""# Blocks against one by one

Written by `python benchmarks/engine_parity.py` ({machine}).

{usage}

## Every adapter, task and family, float64

Largest difference of a trained number, four clients in a block (wanted: below 1e-9). The counts are of
families that go in blocks, packed or padded; those trained one by one have nothing to compare, and those that the job
refuses are not named.

| adapter | task | packed | padded | one by one | largest difference | where |
|---|---|---|---|---|---|---|
{chr(10).join(wide)}

## Sixteen clients, float64 and float32

Blocks of 2, 4 and 16: in float64 from the plain model, in float32 from blocks of one, divided by lr x steps (wanted:
below 1e-9, and below 1e-4). A packed block, and one of clip's, gives each client the very bits that it has alone: 0,
or a last bit where dora adds up otherwise. The other columns are blocks of 16 in float32 from the plain model, which is
padded and rounds otherwise. AdamW divides a gradient by its own
size, so where a gradient is nearly zero its rounding becomes a step: `floor` is how far the plain model in float32 is
from itself in float64, and `eps 1e-3` and SGD show the same without that division.

| adapter | task | family | float64 | float32, from blocks of one | from the plain model | floor | eps 1e-3 | SGD |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(deep)}

## Controls

Largest difference, float64, four clients in a block, with a bug put in.

| bug | difference |
|---|---|
{chr(10).join(controls)}
"""


if __name__ == "__main__":
    main()
