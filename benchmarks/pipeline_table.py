"""Write docs/pipeline.md's tables from the code: each pair of steps, and of algorithm and step, run or refused.

    python benchmarks/pipeline_table.py            write the tables anew
    python benchmarks/pipeline_table.py --check    change nothing; fail where one is out of date

A pair that is not refused is run: two rounds of three toy clients, of which something must come out that is finite.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from weft import plugins
from weft.core import pipeline, trees
from weft.core.errors import JobError
from weft.core.round import Federation
from weft.core.types import Algorithm, Link, Server, Transform
from weft.links.local import Local
from weft.secure.refusals import refuse
from weft.secure.simulated import simulate
from weft.testing import toys

PAGE = Path(__file__).parents[1] / "docs" / "pipeline.md"
ALL = ("delta", "clip", "weigh", "ring")
NEEDS: dict[str, tuple[str, ...]] = {
    "clip": ("delta",),
    "discrete_noise": ALL,
    "lowrank": ("delta",),
    "mask": ALL,
    "noise": ("delta", "clip", "weigh"),
    "random_mask": ("delta",),
    "ring": ("delta", "clip", "weigh"),
    "topk": ("delta",),
}
"""What a step needs before it."""
KEYS: dict[str, dict[str, Any]] = {
    "clip": {"norm": 1.0},
    "discrete_noise": {"multiplier": 0.01, "colluders": 1},
    "krum": {"byzantine": 0},
    "local_heads": {"stays": ["n.*"]},
    "lowrank": {"rank": 1},
    "multi_krum": {"byzantine": 0},
    "noise": {"multiplier": 0.01},
    "norm_bound": {"norm": 1.0},
    "random_mask": {"feedback": False},
    "task_experts": {"tasks": {"all": ["*"]}},
    "topk": {"feedback": False},
    "weigh": {"by": "uniform"},
}
"""Keys that a plug-in is tried with."""
FACTS = replace(toys.FACTS, clients=5, per_round=5, uniform=True, lr=0.01)


@dataclass(frozen=True)
class Pair:
    """Two steps, the first before the second, or an algorithm and a step."""

    first: str
    second: str
    algorithm: str = "fedavg"


def transforms() -> list[str]:
    return plugins.names("transform")


def pairs() -> list[Pair]:
    """Return every pair of steps in both orders, and every algorithm with every step: the one list."""
    steps = transforms()
    return [Pair(*two) for two in product(steps, steps)] + [
        Pair("", step, algorithm) for algorithm, step in product(plugins.names("algorithm"), steps)
    ]


def made(kind: str, name: str) -> Any:
    return plugins.build(plugins.parse(kind, {name: KEYS.get(name, {})}), kind)


def names(pair: Pair) -> list[str]:
    """Return what both steps need, the two, and `weigh` where nothing weighs, `mask` where shares must be hidden."""
    own = [step for step in (pair.first, pair.second) if step]
    needs = [need for need in ALL if any(need in NEEDS.get(step, ()) for step in own) and need not in own]
    after = ["mask"] if "discrete_noise" in own and "mask" not in own else []
    return [*needs, *own, *(after if "weigh" in (*needs, *own) else ["weigh"])]


def outcome(pair: Pair) -> str:
    """Return `runs`, or the reason why a pair is refused; raise AssertionError for one that is neither."""
    algorithm: Algorithm = made("algorithm", pair.algorithm)
    steps: list[tuple[str, Transform]] = [(name, made("transform", name)) for name in names(pair)]
    try:
        pipeline.check(steps)
        algorithm.check(replace(FACTS, pipeline=tuple(name for name, _ in steps)))
        pipeline.check_algorithm(algorithm, steps)
        refuse(pipeline.leaves(steps), FACTS, algorithm)
    except JobError as error:
        return re.sub(r"^(?:pipeline|algorithm): (?:\w+: )?", "", str(error))
    server = played(algorithm, steps)
    assert not trees.not_finite(server.state), pair
    return "runs"


def played(algorithm: Algorithm, steps: list[tuple[str, Transform]]) -> Server:
    """Return what two rounds leave, with keys and masks where the steps hide updates."""
    toy = toys.toy()
    if not pipeline.leaves(steps).hidden:
        return toys.play(lambda: algorithm, steps, 2, toy=toy).servers[-1]
    crowd = simulate("table", tuple(toy.clients), toy.per_round, 7)
    with TemporaryDirectory() as folder:
        members = crowd.members(Path(folder))

        def with_keys(site: toys.ToySite) -> Link:
            return Local([replace(site, members=members)])

        def hidden(federation: Federation) -> Federation:
            return replace(federation, secure=crowd.coordinator())

        return toys.play(lambda: algorithm, steps, 2, toy=toy, through=with_keys, how=hidden).servers[-1]


def tables() -> tuple[str, str]:
    """Return both tables, with the reasons below."""
    reasons: list[str] = []

    def cell(pair: Pair) -> str:
        told = outcome(pair)
        if told == "runs":
            return "yes"
        if told not in reasons:
            reasons.append(told)
        return f"({reasons.index(told) + 1})"

    steps = transforms()
    both = list(_rows("first \\ second", steps, steps, lambda row, column: cell(Pair(row, column))))
    listed = "".join(f"{i}. {reason}\n" for i, reason in enumerate(reasons, start=1))
    reasons = []
    rules = plugins.names("algorithm")
    every = list(_rows("algorithm", rules, steps, lambda row, column: cell(Pair("", column, row))))
    told = "".join(f"{i}. {reason}\n" for i, reason in enumerate(reasons, start=1))
    return "\n".join(both) + "\n\n" + listed, "\n".join(every) + "\n\n" + told


def _rows(corner: str, rows: Sequence[str], columns: Sequence[str], cell: Any) -> Iterator[str]:
    yield f"| {corner} | " + " | ".join(f"`{name}`" for name in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in rows:
        yield f"| `{row}` | " + " | ".join(cell(row, column) for column in columns) + " |"


def page(text: str) -> str:
    """Return the page with its tables written anew."""
    for name, table in zip(("steps", "algorithms"), tables(), strict=True):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{table}{end}{rest.partition(end)[2]}"
    return text


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    text = PAGE.read_text(encoding="utf8")
    fresh = page(text)
    if "--check" in arguments:
        return int(fresh != text)
    PAGE.write_text(fresh, encoding="utf8")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # many threads on tiny tensors only wait for each other
    sys.exit(main(sys.argv[1:]))
