"""An adapter in the last layers alone: what the frozen layers below it cost at every step, and computed once.

    python benchmarks/upper.py [--shapes 5M 25M] [--repeats 3]

LoRA r=8 on q and v of the last layers of a LLaMA; blocks as a site makes them, rows of drawn lengths (`engine.py
--drawn`), one thread, CPU time. `at every step`: all layers run; `first`: the epoch in which each example goes through
the lower layers by itself; `later`: each one after it. `apart` is the largest difference of a trained number after an
epoch between the two ways, `moved` how far one went. Writes results/upper.md.
"""

import argparse
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from engine import SHAPES, auto, drawn, loaded, recipe

from weft.core import trees
from weft.core.types import Tensors
from weft.site.below import Kept
from weft.site.cohort import Cohort
from weft.site.model import Loaded
from weft.tasks.causal_lm import causal_lm

PAGE = Path(__file__).parent / "results/upper.md"
CLIENTS, STEPS = 8, 4
CASES = {"5M": (2, 1), "25M": (3, 1), "110M": (6, 2)}
"""Shape -> how many of the last layers have the adapter: half of them, and fewer."""


def row_of(shape: str, layers: int, batch: int, repeats: int) -> str:
    """Measure one cell."""
    deep = SHAPES[shape][2]
    names = [f"layers.{i}.self_attn.{part}" for i in range(deep - layers, deep) for part in ("q_proj", "v_proj")]
    model = loaded(shape, targets=names)
    rows = drawn(SHAPES[shape][-1])
    own = {f"c{k}": rows[k * batch * STEPS : (k + 1) * batch * STEPS] for k in range(CLIENTS)}
    mean = sum(len(row["ids"]) for part in own.values() for row in part) / (CLIENTS * STEPS * batch)
    size = min(CLIENTS, auto(model, batch * mean))
    size_of_base = sum(p.nbytes for p in model.net.parameters())
    plain = replace(model, below=replace(model.below, layers=()))
    often = replace(recipe(batch, STEPS), rounds=9)
    start = {name: p.detach() for name, p in model.initial.items()}
    times: dict[str, list[float]] = {"step": [], "first": [], "later": []}
    kept, ends = Kept(size_of_base), dict[str, Tensors]()

    def epoch(name: str, engine: Loaded) -> None:
        cohort = Cohort(engine, causal_lm(), often, 0, "packed", engine.lift)
        begin = time.process_time()
        for at in range(0, CLIENTS, size):
            part = dict(list(own.items())[at : at + size])
            ends[name] = cohort.train(1, part, trees.expand(start, len(part)), {}, None).params
        times[name].append(time.process_time() - begin)

    for _ in range(repeats + 1):
        epoch("step", plain)
        kept = Kept(size_of_base)
        fresh = replace(model, below=replace(model.below, kept=kept))
        epoch("first", fresh)
        epoch("later", fresh)
    middle = {name: 1000 * statistics.median(values[1:]) for name, values in times.items()}
    apart = max(float((ends["step"][name] - ends["later"][name]).abs().max()) for name in start)
    moved = max(float((ends["step"][name] - start[name]).abs().max()) for name in start)
    tokens = sum(len(row["ids"]) for part in own.values() for row in part)
    return (
        f"| {shape} | {layers} of {deep} | {batch} | {tokens} | {middle['step']:.0f} | {middle['first']:.0f} "
        f"| {middle['later']:.0f} | {middle['step'] / middle['first']:.2f} | {middle['step'] / middle['later']:.2f} "
        f"| {kept.bytes / 1e6:.0f} | {apart:.0e} | {moved:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["5M", "25M"], choices=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for shape in options.shapes:
        for layers in CASES[shape]:
            for batch in (1, 4):
                lines.append(row_of(shape, layers, batch, options.repeats))
                print(lines[-1], flush=True)
    head = (
        "| LLaMA | layers with the adapter | batch | tokens an epoch | at every step | first | later "
        "| every step / first | every step / later | kept, MB | apart | moved |"
    )
    page = [
        "# An adapter in the last layers alone",
        "",
        f"CPU milliseconds of an epoch of {CLIENTS} clients, {STEPS} steps each, AdamW, clipping, float32; medians of "
        f"{options.repeats} interleaved. Machine: one thread of {os.cpu_count()} cores ({platform.machine()}), torch "
        f"{torch.__version__}. Written by `python benchmarks/upper.py`, which says what the columns are.",
        "",
        head,
        "|" + "---|" * (head.count("|") - 1),
        *lines,
    ]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
