"""docs/pipeline.md: each pair of steps, and of algorithm and step, is run or refused; the tables say which."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from weft import plugins

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pipeline_table.py"
TABLE: dict[str, Any] = runpy.run_path(str(SCRIPT))
PAIR = TABLE["Pair"]


def test_every_pair_is_run_or_refused_as_the_page_says() -> None:
    """Writing the tables runs every pair of the one list that is not refused."""
    text = TABLE["PAGE"].read_text(encoding="utf8")
    assert TABLE["page"](text) == text, "run python benchmarks/pipeline_table.py"


def test_the_list_is_complete() -> None:
    steps, rules = plugins.names("transform"), plugins.names("algorithm")
    assert len(TABLE["pairs"]()) == len(steps) ** 2 + len(rules) * len(steps)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("quantize", "clip"), "put clip before it"),
        (("noise", "clip"), "nothing bounds what one client adds"),
        (("quantize", "topk"), "put it before quantize"),
        (("topk", "delta"), "put delta before it"),
        (("quantize", "discrete_noise"), "put it between ring and mask"),
        (("zstd", "discrete_noise"), "put it between ring and mask"),
        (("ring", "noise"), "a ring holds integers"),
        (("noise", "ring"), "a ring holds integers"),
        (("weigh", "weigh"), "would divide twice"),
        (("weigh", "delta"), "put delta before weigh"),
        (("zstd", "quantize"), "zstd left codes"),
        (("topk", "random_mask"), "topk leaves codes"),
        (("", "noise", "krum"), "noise is for sums"),
        (("", "delta", "flora"), "ranks of their own"),
        (("", "clip", "fednova"), "clip would change it"),
    ],
)
def test_refused(pair: tuple[str, ...], words: str) -> None:
    assert words in TABLE["outcome"](PAIR(*pair))


@pytest.mark.parametrize(
    "pair",
    [
        ("delta", "clip"),
        ("topk", "quantize"),
        ("clip", "topk"),
        ("noise", "quantize"),
        ("quantize", "zstd"),
        ("", "quantize", "krum"),
        ("", "quantize", "flora"),
        ("", "topk", "median"),
        ("", "noise", "ffa_lora"),
    ],
)
def test_run(pair: tuple[str, ...]) -> None:
    assert TABLE["outcome"](PAIR(*pair)) == "runs"
