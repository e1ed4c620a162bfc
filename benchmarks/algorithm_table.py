"""Write the tables of docs/algorithms.md and docs/algorithm_tests.md, from the code and from the tests.

    python benchmarks/algorithm_table.py          write the tables anew
    python benchmarks/algorithm_table.py --check  change nothing; fail where one is out of date

What a rule asks for, and what it goes with, is what its `check` refuses. What travels and what stays is counted over
four rounds of six toy clients with one LoRA pair and one head. What is tested of a rule are the names of its tests.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weft import plugins
from weft.core import pipeline, trees
from weft.core.errors import JobError
from weft.core.round import Federation, run_round
from weft.core.types import Algorithm, At, Order, Parcel, Question, Reply, Server, State
from weft.testing import toys
from weft.testing.toys import Client, ToyWork
from weft.transforms.weigh import weigh

ROOT = Path(__file__).parents[1]
PAGE, TESTS = ROOT / "docs" / "algorithms.md", ROOT / "docs" / "algorithm_tests.md"
KEYS: dict[str, dict[str, Any]] = {
    "norm_bound": {"norm": 1.0},
    "task_experts": {"tasks": {"one": ["c[0-2]"], "two": ["c[3-5]"]}},
}
"""Keys that a rule needs."""
ROUNDS, CLIENTS = 4, 6
PIPELINE = [("weigh", weigh())]
FIRST = {  # sides larger than the ranks that any rule grows to
    "head.modules_to_save.default.weight": toys.draw((3, 5), "head"),
    "m.lora_A.default.weight": 0.1 * toys.draw((2, 96), "A"),
    "m.lora_B.default.weight": torch.zeros(90, 2),
}
FACTS = replace(toys.FACTS, clients=100, per_round=100, pipeline=("weigh",), lr=0.01)
COLUMNS = (
    "algorithm",
    "adapters",
    "ranks",
    "optimizer",
    "clients a round",
    "secure aggregation",
    "own adapters",
    "kept at a client",
    "up",
    "down",
)


def made(name: str) -> Algorithm:
    """Return an algorithm with its defaults, and the keys that it needs."""
    built: Algorithm = plugins.build(plugins.parse("algorithm", {name: KEYS.get(name, {})}), "algorithm")
    return built


# --- what a rule asks for


def takes(algorithm: Algorithm, **facts: Any) -> bool:
    """Tell whether a rule takes such a job."""
    try:
        algorithm.check(replace(FACTS, **facts))
    except JobError:
        return False
    return True


def optimizers(algorithm: Algorithm) -> str:
    """Say which optimizers of the clients a rule takes."""
    if takes(algorithm, optimizer="adamw"):
        return "any"
    return "sgd" if takes(algorithm, momentum=0.9) else "sgd without momentum"


def cohorts(algorithm: Algorithm) -> str:
    """Say how many clients a round must have."""
    least = next(count for count in range(1, 101) if takes(algorithm, clients=count, per_round=count))
    if not takes(algorithm, per_round=50):
        return "all, or any by `weigh: uniform`"
    return f"{least} or more" if least > 1 else "any"


# --- what travels and what stays


@dataclass
class Square:
    """A site and its link in one: toy clients with one layer and one head; `up` and `down` hold what travelled."""

    algorithm: Algorithm
    kept: dict[str, State] = field(default_factory=dict)
    down: list[State] = field(default_factory=list)
    up: list[State] = field(default_factory=list)

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Train every client of the order in one block."""
        self.down.append(order.state)
        names, count = order.clients, len(order.clients)
        target = {"m": toys.draw((90, 96), "target"), "head.modules_to_save.default.weight": torch.zeros(3, 5)}
        members = tuple(Client(trees.add(target, target, 0.1 * i)) for i in range(count))
        steps, ones = torch.full((count,), 2), torch.ones(count, dtype=torch.long)
        work = ToyWork(names, members, 0.05, ones, steps, 0 * ones, trees.expand(FIRST, count), order.round)
        kept = trees.stack_states(self.kept.get(name, self.algorithm.keep(FIRST)) for name in names)
        update, kept = self.algorithm.client(work, trees.expand_state(order.state, count), kept)
        for row, name in enumerate(names):
            self.kept[name] = trees.pick_state(kept, row)
            own = self.algorithm.cut(trees.pick_state(update, row))
            parcel = pipeline.down(PIPELINE, At(0, order.round, name), Parcel(own, 1))
            self.up += [parcel.update] if not row else []
            yield Reply(name, order.round, parcel.update, parcel.weight, 1)

    def ask(self, question: Question) -> list[Any]:
        """Answer nothing."""
        return []


def traffic(algorithm: Algorithm) -> Square:
    """Return what a few rounds sent, received and kept."""
    link, names = Square(algorithm), tuple(f"c{i}" for i in range(CLIENTS))
    federation = Federation(algorithm, PIPELINE, names, CLIENTS, 0, toys.products, FIRST)
    server = Server(algorithm.init(FIRST))
    for _ in range(ROUNDS):
        server, _ = run_round(server, federation, link)
    return link


def amount(state: State) -> str:
    """Say how many numbers a state holds, in units of A, of B, of the head, of all three together (P)."""
    sizes = {"A": ".lora_A.", "B": ".lora_B.", "head": "modules_to_save"}
    flat = trees.flatten(state)
    parts = {
        word: sum(value.numel() for name, value in flat.items() if mark in name)
        / next(value.numel() for name, value in FIRST.items() if mark in name)
        for word, mark in sizes.items()
    }
    rest = trees.count({name: v for name, v in flat.items() if not any(mark in name for mark in sizes.values())})
    whole = min(parts.values())
    left = {"P": whole, **{word: count - whole for word, count in parts.items()}}
    told = [f"{f'{count:.3g} ' if count != 1 else ''}{word}" for word, count in left.items() if count]
    told += [f"{rest} number{'s' if rest > 1 else ''}"] if rest else []
    return " + ".join(told) or "0"


def over_rounds(states: list[State]) -> str:
    """Say what every round moved, or how it changes."""
    told = [amount(state) for state in states]
    found = list(dict.fromkeys(told))
    if len(found) == 1:
        return found[0]
    return " / ".join(found) if len(found) == 2 and told[0] == told[2] else f"{told[0]}, in round {ROUNDS} {told[-1]}"


# --- the table


def row(name: str) -> str:
    """Return one algorithm's row."""
    algorithm = made(name)
    link = traffic(algorithm)
    cells = (
        f"`{name}`",
        "any" if takes(algorithm, low_rank=False) else "lora",
        "one a client" if takes(algorithm, mixed_ranks=True) else "one for all",
        optimizers(algorithm),
        cohorts(algorithm),
        "no" if algorithm.combine else "yes" if any(link.up) else "nothing is sent",
        "yes" if algorithm.personal else "no",
        amount(link.kept["c0"]),
        over_rounds(link.up),
        over_rounds(link.down),
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the table of all algorithms."""
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    return "\n".join([head, *(row(name) for name in plugins.names("algorithm"))]) + "\n"


GOES_WITH = (
    "algorithm",
    "secure aggregation",
    "privacy noise",
    "`local.dp`",
    "ranks of their own",
    "`clients.pace`",
    "samplers `poisson`, `availability`",
    "samplers `weighted`, `availability`, `utility`",
    "AdamW",
    "kept moments",
    "weight decay",
)


CLIPPED = ("delta", "clip", "weigh")  # what masks and noise stand after


def pair(name: str) -> str:
    """Return one algorithm's row of what it goes with; `no` is a job that `weft check` refuses."""
    algorithm = made(name)
    sums = algorithm.combine is None and bool(algorithm.sends)
    part = {"per_round": 50, "uniform": True}
    cells = (
        sums and takes(algorithm, hidden=True, pipeline=(*CLIPPED, "ring", "mask")),
        sums and takes(algorithm, noise=1.0, pipeline=(*CLIPPED, "noise")),
        takes(algorithm, dp=True),
        takes(algorithm, mixed_ranks=True),
        algorithm.stale and algorithm.combine is None,
        takes(algorithm, fixed=False, **part),
        takes(algorithm, even=False, **part),
        takes(algorithm, optimizer="adamw"),
        takes(algorithm, moments="keep"),
        takes(algorithm, weight_decay=0.01),
    )
    return f"| `{name}` | {' | '.join('yes' if cell else 'no' for cell in cells)} |"


def matrix() -> str:
    """Return the table of what each algorithm goes with."""
    head = f"| {' | '.join(GOES_WITH)} |\n|{'---|' * len(GOES_WITH)}"
    return "\n".join([head, *(pair(name) for name in plugins.names("algorithm"))]) + "\n"


# --- what is tested


def files_of(name: str) -> list[Path]:
    """Return the test file of an algorithm, or those that import it where it has none of its own."""
    folder = ROOT / "tests" / "algorithms"
    if (folder / f"test_{name}.py").is_file():
        return [folder / f"test_{name}.py"]
    line = f"from weft.algorithms.{name} import"
    return [path for path in sorted(folder.glob("test_*.py")) if line in path.read_text(encoding="utf8")][:1]


def sentences(path: Path) -> list[str]:
    """Return the names of a file's tests as they are read.

    >>> sentences(Path(__file__))
    []
    """
    names = re.findall(r"^def test_(\w+)\(", path.read_text(encoding="utf8"), re.MULTILINE)
    return [name.replace("_", " ") for name in names]


def tested() -> str:
    """Return the table of what is tested of each algorithm."""
    rows = ["| algorithm | tests in | what they say |", "|---|---|---|"]
    for name in plugins.names("algorithm"):
        for path in files_of(name):
            told = "; ".join(sentences(path))
            rows.append(f"| `{name}` | `{path.relative_to(ROOT).as_posix()}` | {told} |")
    return "\n".join(rows) + "\n"


PARTS = {"table": table, "matrix": matrix, "tested": tested}


def page(text: str) -> str:
    """Return a page with its tables written anew."""
    for name, part in PARTS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}{part()}{end}{rest.partition(end)[2]}"
    return text


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    stale = 0
    for path in (PAGE, TESTS):
        text = path.read_text(encoding="utf8")
        fresh = page(text)
        stale += fresh != text
        if "--check" not in arguments:
            path.write_text(fresh, encoding="utf8")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    torch.set_num_threads(1)  # many threads on tiny tensors only wait for each other
    sys.exit(main(sys.argv[1:]))
