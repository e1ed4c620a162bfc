"""A block of K clients against the limits: centralized training on the same tokens, and the clients one by one.

    python benchmarks/engine.py [--shapes 5M 25M] [--clients 4 8 16] [--batches 1 2 4] [--lengths 32 128] [--ragged]

Everything runs in one process on one model object, one thread, in process CPU time (wall time means nothing on a
shared machine), the variants in turn A B C A B C, medians after a warm-up. `central` is plain peft with torch.optim
on batches of K*b examples; `block` is one step of all clients; `alone` is a step of each client by itself. Writes
benchmarks/results/engine.md.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from weft.adapters.lora import lora
from weft.core import trees
from weft.core.task import Example
from weft.site.cohort import Cohort, Mode, Recipe
from weft.site.lift import Lift
from weft.site.model import Loaded, _places
from weft.tasks.causal_lm import causal_lm

SHAPES = {"5M": (256, 688, 4, 4), "25M": (512, 1376, 6, 8), "110M": (768, 2048, 12, 12)}
RESULTS = Path(__file__).parent / "results"


def loaded(shape: str) -> Loaded:
    """Return a random LLaMA with LoRA r=8 on q and v."""
    hidden, inner, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    net = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = lora(rank=8, targets=["q_proj", "v_proj"]).attach(net, "CAUSAL_LM", 0)
    places, initial = _places(net)
    tokenizer = type("Pad", (), {"pad_token_id": 0})()
    return Loaded(net, tokenizer, torch.device("cpu"), places, initial, Lift(net, places))


def recipe(batch: int) -> Recipe:
    return Recipe(
        optimizer="adamw", lr=1e-3, batch=batch, accumulate=1, epochs=1, steps=1, schedule="constant", warmup=0.0,
        clip=1.0, weight_decay=0.0, momentum=0.0, moments="reset", checkpointing=False, rounds=1,
    )  # fmt: skip


def examples(count: int, length: int, ragged: bool) -> list[Example]:
    """Return random examples: equal lengths with every token learned, or ragged with the last 40 % learned."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        n = length
        if ragged:
            n = int(
                torch.empty(1).log_normal_(torch.tensor(float(length)).log().item(), 0.6, generator=draw).clamp(8, 256)
            )
        ids = torch.randint(1, 8192, (n,), generator=draw)
        labels = ids.clone()
        labels[: int(0.6 * n) if ragged else 1] = -100
        rows.append({"ids": ids, "labels": labels})
    return rows


def central(model: Loaded, rows: list[Example]) -> Callable[[], None]:
    """Return one step of ordinary training of one adapter on all examples, padded."""
    params = [p.detach().clone().requires_grad_() for p in model.initial.values()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    longest = max(len(row["ids"]) for row in rows)

    def pad(row: Any, value: int) -> Any:
        return torch.nn.functional.pad(row, (0, longest - len(row)), value=value)

    ids = torch.stack([pad(row["ids"], 0) for row in rows])
    labels = torch.stack([pad(row["labels"], -100) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row["ids"]), 0) for row in rows])

    def step() -> None:
        with model.holding(dict(zip(model.initial, params, strict=True))) as net:
            logits = net(input_ids=ids, attention_mask=mask, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def block(
    model: Loaded, rows: list[Example], clients: int, batch: int, mode: Mode, together: bool
) -> Callable[[], None]:
    """Return one step of every client, in one block or one after another."""
    cohort = Cohort(model, causal_lm(), recipe(batch), 0, mode, model.lift)
    data = {f"c{k:02}": rows[k * batch : (k + 1) * batch] for k in range(clients)}
    start = {name: p.detach() for name, p in model.initial.items()}

    def step() -> None:
        parts = [data] if together else [{name: own} for name, own in data.items()]
        for part in parts:
            cohort.train(1, part, trees.expand(start, len(part)), {}, None)

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median CPU milliseconds of each variant, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if turn:
                times[name].append(1000 * (time.process_time() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["5M"], choices=SHAPES)
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for shape in options.shapes:
        model = loaded(shape)
        for clients in options.clients:
            for batch in options.batches:
                for length in options.lengths:
                    rows = examples(clients * batch, length, options.ragged)
                    steps = {
                        "central": central(model, rows),
                        "block": block(model, rows, clients, batch, "packed", True),
                        "alone packed": block(model, rows, clients, batch, "packed", False),
                        "alone padded": block(model, rows, clients, batch, "padded", False),
                    }
                    got = measure(steps, options.repeats)
                    lines.append(
                        f"| {shape} | {clients} | {batch} | {'~' if options.ragged else ''}{length} "
                        + "".join(f"| {got[name]:.0f} " for name in steps)
                        + f"| {got['block'] / got['central']:.2f} | {got['alone padded'] / got['block']:.2f} "
                        + f"| {got['alone packed'] / got['block']:.2f} |"
                    )
                    print(lines[-1], flush=True)
    write(lines, options)


def write(lines: list[str], options: argparse.Namespace) -> None:
    machine = f"{platform.machine()}, one thread of {os.cpu_count()} cores, torch {torch.__version__}"
    kind = "ragged" if options.ragged else "equal"
    text = (
        f"# The engine: {kind} lengths\n\nCPU milliseconds of one step of all clients, LoRA r=8 on q and v, AdamW, "
        f"clipping; medians of {options.repeats}. Machine: {machine}. Command: `python benchmarks/engine.py`"
        f"{' --ragged' if options.ragged else ''}.\n\n"
        "| LLaMA | clients | batch | tokens | central | block | alone, packed | alone, padded "
        "| block / central | padded alone / block | packed alone / block |\n|" + "---|" * 11 + "\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"engine_{kind}.md").write_text(text + "\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
