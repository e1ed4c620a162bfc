"""What every task must pass, with a tiny Llama, or ViT or CLIP, and a tokenizer of characters."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.task import Example, Probe, Task
from weft.core.types import Metrics
from weft.testing.sound import bits, require, run_all, running
from weft.testing.tiny import RECORDS, model, reader

MakeTask = Callable[[], Task]
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bench:
    """A task with a model, a tokenizer and some encoded records."""

    task: Task
    net: nn.Module
    tokenizer: Any
    classes: tuple[str, ...]
    examples: Sequence[Example]

    @torch.no_grad()
    def loss(self, rows: Sequence[Sequence[Example]]) -> tuple[Tensor, Tensor]:
        """Return each client's summed loss and what it is summed over."""
        with running("collate and loss fail"):
            total, count = self.task.loss(self.net, self.task.collate(rows, self.tokenizer.pad_token_id))
        shapes = tuple(total.shape), tuple(count.shape)
        require(shapes == ((len(rows),),) * 2, f"loss gives shapes {shapes}, not a sum and a count a client")
        return total, count

    @torch.no_grad()
    def measure(self, examples: Sequence[Example]) -> Metrics:
        """Return the task's sums, for all of its metrics."""
        with running("measure fails"):
            probe = Probe(self.net, self.tokenizer, 3, 4, None)
            return self.task.measure(probe, examples, self.task.metrics)


def _bench(make: MakeTask, records: Records) -> Bench:
    task = make()
    words = reader(task.reads)
    with running("the records cannot be encoded"):
        classes = task.classes(records)
        examples = task.encode(words, records, classes).examples
    require(len(examples) >= 6, "give at least six records that the task can learn from")
    net = _net(task, classes)
    if task.refer:
        with running("the base cannot be asked"):
            examples = task.refer(net, examples, words.pad_token_id, 4)
        _move(net)
    return Bench(task, net, words, classes, examples)


@torch.no_grad()
def _move(net: nn.Module) -> None:
    """Take a model away from the base that examples were compared with: there all differences are rounding."""
    draw = torch.Generator().manual_seed(3)
    for value in net.parameters():
        value.add_(0.05 * torch.randn(value.shape, generator=draw))


def _net(task: Task, classes: tuple[str, ...]) -> nn.Module:
    if "images" not in task.reads:
        return model(task.auto, labels=max(2, len(classes)))
    from weft.testing.families import tiny

    made = tiny("clip" if "text" in task.reads else "vit", task.auto, task.reads)
    assert isinstance(made, nn.Module)
    return made.eval()


def _ragged(bench: Bench) -> list[Example]:
    """Return six examples whose neighbours differ in length."""
    ordered = sorted(bench.examples, key=bench.task.length)
    return [row for pair in zip(ordered[:3], ordered[::-1][:3], strict=True) for row in pair]


def check_encoding(make: MakeTask, records: Records = RECORDS) -> None:
    """Encode every record or count it as dropped, the same each time, and leave the records as they were."""
    task, given = make(), [dict(record) for record in records]
    words = reader(task.reads)
    classes = task.classes(given)
    first = task.encode(words, given, classes)
    require(given == [dict(record) for record in records], "encode changes the records")
    again = bits(task.encode(words, given, classes))
    require(bits(first) == again, "encode gives another result when it is asked again")
    whole = len(first.examples) + first.dropped == len(records)
    require(whole, f"{len(first.examples)} examples and {first.dropped} dropped of {len(records)} records")


def check_padding(make: MakeTask, records: Records = RECORDS) -> None:
    """Give two examples together the loss that they have alone: padding counts for nothing.

    Pictures have no padding, and what compares examples has no loss for one alone; `check_clients` pads those.
    """
    bench = _bench(make, records)
    if bench.task.least > 1 or "text" not in bench.task.reads:
        return
    short, long = _ragged(bench)[:2]
    require(len(short["ids"]) < len(long["ids"]), "give records of unlike length")
    together, count = bench.loss([[short, long]])
    alone = [bench.loss([[row]]) for row in (short, long)]
    counts = int(count) == sum(int(part) for _, part in alone)
    require(counts, "padding changes how many labels the loss counts")
    near = torch.allclose(together, torch.stack([part for part, _ in alone]).sum(0), rtol=1e-3)
    require(near, "padding changes the loss")


def check_clients(make: MakeTask, records: Records = RECORDS) -> None:
    """Sum each client's loss apart, whatever its neighbours have, and however many.

    The losses add up to that of all examples, save where a client's examples are compared with each other.
    """
    bench = _bench(make, records)
    rows = _ragged(bench)
    groups = [rows[:3], rows[3:4], rows[4:]]
    total, count = bench.loss(groups)
    for place, group in enumerate(groups):
        own, weight = bench.loss([group])
        require(int(count[place]) == int(weight), "a client's count depends on its neighbours in the block")
        near = torch.allclose(total[place], own[0], rtol=1e-3)
        require(near, "a client's loss depends on its neighbours in the block")
    if bench.task.least > 1:
        return
    whole, _ = bench.loss([rows])
    near = torch.allclose(whole, total.sum(), rtol=1e-3)
    require(near, "the losses of clients do not add up to the loss of all their examples")


def check_shortening(make: MakeTask, records: Records = RECORDS) -> None:
    """Cut an example to some tokens, something left to learn, and leave the example as it was; not a picture."""
    bench = _bench(make, records)
    if "text" not in bench.task.reads:
        return
    for example in bench.examples:
        before, longest = bits(example), len(example["ids"]) - 1
        short = bench.task.shorten(example, longest)
        require(bits(example) == before, "shorten changes the example")
        require(len(short["ids"]) <= longest, f"{len(short['ids'])} tokens are left, not {longest}")
        _, count = bench.loss([[bench.task.shorten(example, 1)]])
        require(int(count) > 0, "a shortened example has nothing left to learn from")


def check_packing(make: MakeTask, records: Records = RECORDS) -> None:
    """Give the same loss without padding, where a task can pack examples in one row."""
    from weft.site.lanes import Lanes
    from weft.site.packing import packed

    bench = _bench(make, records)
    if bench.task.pack is None:
        return
    rows = _ragged(bench)
    groups = [rows[:3], rows[3:4], rows[4:]]
    with running("packed examples have no loss"):
        batch = bench.task.pack(groups)
        lanes = Lanes(clients=3, tokens=batch["tokens"], lengths=batch["lengths"], selected=batch["counts"])
        with packed(bench.net, lanes), torch.no_grad():
            total, count = bench.task.loss(bench.net, batch)
    expected, counted = bench.loss(groups)
    require(count.tolist() == counted.tolist(), "packing changes how many labels the loss counts")
    require(torch.allclose(total, expected, rtol=1e-3), "packing changes the loss")


def check_measuring(make: MakeTask, records: Records = RECORDS) -> None:
    """Measure sums: those of two halves add up to those of the whole, save where examples are compared."""
    bench = _bench(make, records)
    if bench.task.least > 1:
        return
    half = len(bench.examples) // 2
    whole = bench.measure(bench.examples)
    parts = [bench.measure(rows) for rows in (bench.examples[:half], bench.examples[half:])]
    for name in sorted(whole.keys() | parts[0].keys() | parts[1].keys()):
        added = sum(part.get(name, 0.0) for part in parts)
        near = math.isclose(added, whole.get(name, 0.0), rel_tol=1e-3, abs_tol=1e-6)
        require(near, f"`{name}` is {whole.get(name)} for all examples, and {added} as the sum of two halves")


def check_each(make: MakeTask, records: Records = RECORDS) -> None:
    """Measure example by example, where a task can: one row each, in order, which add up to `measure`."""
    from weft.core.metrics import added

    bench = _bench(make, records)
    if bench.task.each is None:
        return
    probe = Probe(bench.net, bench.tokenizer, batch=5, max_new_tokens=3, generated=4)
    with running("each fails"), torch.no_grad():
        rows = bench.task.each(probe, bench.examples, bench.task.metrics)
        (last,) = bench.task.each(probe, bench.examples[-1:], ("loss",))
        whole = bench.task.measure(probe, bench.examples, bench.task.metrics)
    require(len(rows) == len(bench.examples), f"each gives {len(rows)} rows for {len(bench.examples)} examples")
    found = added(rows)
    for name in sorted(whole.keys() | found.keys()):
        near = math.isclose(found.get(name, 0.0), whole.get(name, 0.0), rel_tol=1e-3, abs_tol=1e-6)
        require(near, f"`{name}` is {whole.get(name)} measured together, and {found.get(name)} example by example")
    for name, value in last.items():
        near = math.isclose(rows[-1].get(name, 0.0), value, rel_tol=1e-3, abs_tol=1e-6)
        require(near, f"each does not keep the order: `{name}` of the last example is {value} alone")


def check_summary(make: MakeTask, records: Records = RECORDS) -> None:
    """Summarize sums as means: doubled sums give the same finite metrics; leave the sums as they were."""
    bench = _bench(make, records)
    sums = bench.measure(bench.examples)
    before = dict(sums)
    with running("summarize fails"):
        once = bench.task.summarize(sums)
        twice = bench.task.summarize({name: 2 * value for name, value in sums.items()})
    require(sums == before, "summarize changes the sums")
    for name, value in once.items():
        require(math.isfinite(value), f"the metric `{name}` is {value}")
        same = math.isclose(value, twice[name], rel_tol=1e-9)
        require(same, f"the metric `{name}` changes when every example is counted twice: divide by the count")


TASK = (
    check_encoding,
    check_padding,
    check_clients,
    check_shortening,
    check_packing,
    check_measuring,
    check_each,
    check_summary,
)


def check_task(make: MakeTask, records: Records = RECORDS, waive: Collection[str] = ()) -> None:
    """Run all checks of a task."""
    run_all(TASK, waive, make, records)
