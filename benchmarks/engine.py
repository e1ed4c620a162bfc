"""A block of K clients against the limits: centralized training on the same tokens, and the clients one by one.

    python benchmarks/engine.py                 # equal lengths -> results/engine_equal.md
    python benchmarks/engine.py --ragged        # questions and answers -> results/engine_ragged_medquad.md
    python benchmarks/engine.py --ragged --drawn  # short ones of drawn lengths -> results/engine_ragged_drawn.md
    python benchmarks/engine.py --budget        # how many tokens a step should have -> results/engine_budget.md
    python benchmarks/engine.py --device cuda --dtype bfloat16 --shapes 0.6B --clients 8 32 64

Everything runs in one process on one model object, the variants in turn A B C A B C, medians after a warm-up; on a
processor one thread and its CPU time (wall time means nothing on a shared machine), on a GPU wall time to a
synchronised end. A variant takes `steps_of` optimizer steps of every client, from its start to its end, and the time
is divided by their number.

- central: plain peft with torch.optim, one adapter, batches of clients x batch examples: the limit
- loop: plain peft and torch.optim, one client after another, the adapters swapped by copy, each batch padded to its
  own longest row
- one by one: Weft's blocks of one client, packed
- block: one block of all clients, packed
- auto: the blocks that Weft makes, as many clients as fill a step (TOKENS in weft/site/cohort.py)

Ragged lengths are those of examples/data/medquad, or of `--data`, in words of a byte-pair vocabulary of 8,192 learned
from that text, cut at 512; the model learns the answers. Drawn lengths are those of short instructions: lognormal with
a median of 60 tokens and a sigma of 0.6, of which the last 40 % are learned.

Cells with more than MOST tokens a step are left out, if `--most` does not say otherwise. Cells may be measured in
several calls: those of a page that are not measured again stay.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from weft.adapters.lora import lora
from weft.core import trees
from weft.core.task import Example, Task
from weft.site.cohort import TOKENS, Cohort, Mode
from weft.site.model import DTYPES, Loaded, ready
from weft.site.recipe import Recipe
from weft.tasks.causal_lm import causal_lm

SHAPES = {
    "5M": (256, 688, 4, 4, 8192),
    "25M": (512, 1376, 6, 8, 8192),
    "110M": (768, 2048, 12, 12, 32000),
    "0.6B": (1536, 4096, 20, 16, 32000),
}
"""Hidden size, inner size, layers, heads, vocabulary."""
MOST = {"5M": 4096, "25M": 1024, "110M": 512, "0.6B": 10**6}
"""Tokens of a step; cells with more are left out, since they take minutes and are all arithmetic."""
FULL = {"5M": 2048, "25M": 1024, "110M": 256, "0.6B": 10**6}
"""Tokens that are measured together, in up to four steps: small ones are more than their begin and end."""
LONGEST, MANY = 512, 4000  # tokens of an example, and examples that are encoded
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
MEDQUAD = ROOT / "examples/data/medquad/train.jsonl"
Step = Callable[[], object]


def loaded(
    shape: str, device: str = "cpu", dtype: str = "float32", targets: Sequence[str] = ("q_proj", "v_proj")
) -> Loaded:
    """Return a random LLaMA with LoRA r=8, on q and v where nothing else is said."""
    hidden, inner, layers, heads, words = SHAPES[shape]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=words, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = lora(rank=8, targets=[*targets]).attach(net, "CAUSAL_LM", 0)
    tokenizer = type("Pad", (), {"pad_token_id": 0})()
    return ready(adapted.to(device), tokenizer, torch.device(device))


def recipe(batch: int, steps: int) -> Recipe:
    return Recipe(
        optimizer="adamw", lr=1e-3, batch=batch, accumulate=1, epochs=1, steps=steps, schedule="constant", warmup=0.0,
        clip=1.0, weight_decay=0.0, momentum=0.0, moments="reset", checkpointing=False, rounds=1,
    )  # fmt: skip


def equal(count: int, length: int, words: int) -> list[Example]:
    """Return random examples of one length, every token learned."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, words, (length,), generator=draw) for _ in range(count)]
    return [{"ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])} for ids in rows]


@cache
def questions(path: Path) -> list[Example]:
    """Return questions and answers, or instructions with their context and responses, in an order of chance.

    Answers are learned; an example is cut at LONGEST.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    pairs = pairs_of(path)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8192, show_progress=False)
    words.train_from_iterator([" ".join(pair) for pair in pairs], trainer)
    found: list[Example] = []
    for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1)).tolist()[:MANY]:
        asked, told = (torch.tensor(words.encode(text).ids, dtype=torch.int64) for text in pairs[i])
        ids, labels = torch.cat([asked, told]), torch.cat([torch.full_like(asked, -100), told])
        if (labels[:LONGEST] >= 0).any():
            found.append({"ids": ids[:LONGEST], "labels": labels[:LONGEST]})
    return found


@cache
def drawn(words: int) -> list[Example]:
    """Return rows of random tokens with the lengths of short instructions, the end of each learned."""
    draw = torch.Generator().manual_seed(1)
    found: list[Example] = []
    for length in (60 * torch.exp(0.6 * torch.randn(MANY, generator=draw))).round().clamp(8, LONGEST).int().tolist():
        ids = torch.randint(1, words, (length,), generator=draw)
        asked = round(0.6 * length)
        found.append({"ids": ids, "labels": torch.cat([torch.full((asked,), -100), ids[asked:]])})
    return found


def pairs_of(path: Path) -> list[tuple[str, str]]:
    """Return what is asked and what is to be answered, of JSON lines that may be packed by gzip."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    if "question" in rows[0]:
        return [(row["question"], row["answer"]) for row in rows]
    return [(f"{row['instruction']}\n{row['context']}".strip(), row["response"]) for row in rows]


def steps_of(shape: str, tokens: int) -> int:
    """Return how many optimizer steps are measured together."""
    return max(1, min(4, FULL[shape] // tokens))


def padded(rows: list[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch as plain training code makes it."""
    longest = max(len(row["ids"]) for row in rows)

    def pad(row: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(row, (0, longest - len(row)), value=value)

    return {
        "input_ids": torch.stack([pad(row["ids"], 0) for row in rows]).to(device),
        "attention_mask": torch.stack([pad(torch.ones_like(row["ids"]), 0) for row in rows]).to(device),
        "labels": torch.stack([pad(row["labels"], -100) for row in rows]).to(device),
    }


def token_loss(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, batch["labels"][:, 1:].flatten())


def plain(
    model: Loaded,
    clients: list[list[list[Example]]],
    collate: Callable[[list[Example], torch.device], dict[str, torch.Tensor]] = padded,
    loss: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] = token_loss,
) -> Step:
    """Return plain peft training of one client after another; clients: each one's batches."""
    start = {name: p.detach().clone() for name, p in model.initial.items()}
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    batches = [[collate(rows, model.device) for rows in own] for own in clients]

    def step() -> None:
        for own in batches:
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(start[name])
            optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.0, fused=True)
            for batch in own:
                with model.holding(params) as net:
                    loss(net, batch).backward()
                torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return step


def blocks(
    model: Loaded,
    data: dict[str, list[Example]],
    batch: int,
    size: int,
    mode: Mode = "packed",
    task: Callable[[], Task] = causal_lm,
) -> Step:
    """Return the round of all clients in blocks of this size."""
    steps = max(len(rows) for rows in data.values()) // batch
    cohort = Cohort(model, task(), recipe(batch, steps), 0, mode, model.lift)
    start, names = {name: p.detach().cpu() for name, p in model.initial.items()}, list(data)

    def step() -> None:
        for at in range(0, len(names), size):
            part = {name: data[name] for name in names[at : at + size]}
            cohort.train(1, part, trees.expand(start, len(part)), {}, None)

    return step


def auto(model: Loaded, tokens: float) -> int:
    """Return how many clients fill a step, as a site does; tokens: of a client's batch."""
    return max(1, int(TOKENS[model.device.type] // tokens))


def measure(steps: dict[str, Step], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Return the median milliseconds of each variant, taken in turn; of a processor its CPU time."""

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            begin = now()
            step()
            if turn:
                times[name].append(1000 * (now() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def equal_row(model: Loaded, shape: str, clients: int, batch: int, length: int, repeats: int) -> str:
    """Measure one cell of equal lengths; each step sees the same tokens in another order."""
    rows, steps = equal(clients * batch, length, SHAPES[shape][-1]), steps_of(shape, clients * batch * length)
    data = {f"c{k:02}": rows[k * batch : (k + 1) * batch] * steps for k in range(clients)}
    size = auto(model, batch * length)
    variants: dict[str, Step] = {
        "central": plain(model, [[rows] * steps]),
        "block": blocks(model, data, batch, clients),
        "loop": plain(model, [[own[:batch]] * steps for own in data.values()]),
    }
    if size < clients:
        variants["auto"] = blocks(model, data, batch, size)
    got = {name: value / steps for name, value in measure(variants, repeats, model.device.type).items()}
    chosen = got.get("auto", got["block"])
    return (
        f"| {shape} | {clients} | {batch} | {length} | {clients * batch * length} | {got['central']:.0f} "
        f"| {got['loop']:.0f} | {got['block']:.0f} | {min(size, clients)} | {chosen:.0f} "
        f"| {got['block'] / got['central']:.2f} | {chosen / got['central']:.2f} | {got['loop'] / chosen:.2f} |"
    )


def ragged_row(model: Loaded, shape: str, clients: int, batch: int, repeats: int, rows: list[Example]) -> str:
    """Measure one cell of ragged lengths, each client with its own rows."""
    steps = 2 if shape != "5M" or clients * batch > 16 else 4
    own = [[rows[(k * batch * steps + i) % len(rows)] for i in range(batch * steps)] for k in range(clients)]
    own.sort(key=lambda part: sum(len(row["ids"]) for row in part))  # as a site does
    data = {f"c{k:02}": part for k, part in enumerate(own)}
    lengths = [len(row["ids"]) for part in own for row in part]
    mean = max(sum(len(row["ids"]) for row in part) / len(part) for part in own)
    size = auto(model, batch * mean)
    parts = [[part[i : i + batch] for i in range(0, len(part), batch)] for part in own]
    wasted = sum(batch * max(len(row["ids"]) for row in step) for part in parts for step in part) / sum(lengths)
    variants: dict[str, Step] = {
        "loop": plain(model, parts),
        "one": blocks(model, data, batch, 1),
        "block": blocks(model, data, batch, clients),
    }
    if 1 < size < clients:
        variants["auto"] = blocks(model, data, batch, size)
    got = {name: value / steps for name, value in measure(variants, repeats, model.device.type).items()}
    chosen = got["one"] if size == 1 else got.get("auto", got["block"])
    return (
        f"| {shape} | {clients} | {batch} | {sum(lengths) // steps} | {wasted:.2f} | {got['loop']:.0f} "
        f"| {got['one']:.0f} | {got['block']:.0f} | {min(size, clients)} | {chosen:.0f} "
        f"| {got['loop'] / chosen:.2f} | {got['one'] / chosen:.2f} | {got['loop'] / got['block']:.2f} |"
    )


def budget_rows(model: Loaded, shape: str, batch: int, length: int, repeats: int) -> list[str]:
    """Measure 16 clients in blocks of 1 to 16."""
    rows, steps = equal(16 * batch, length, SHAPES[shape][-1]), steps_of(shape, 16 * batch * length)
    data = {f"c{k:02}": rows[k * batch : (k + 1) * batch] * steps for k in range(16)}
    variants = {str(size): blocks(model, data, batch, size) for size in (1, 2, 4, 8, 16)}
    got = measure(variants, repeats, model.device.type)
    return [
        f"| {shape} | {batch} | {length} | {name} | {int(name) * batch * length} | {value / steps:.0f} "
        f"| {got['1'] / value:.2f} |"
        for name, value in got.items()
    ]


KINDS = {
    "equal": "| LLaMA | clients | batch | tokens | tokens a step | central | loop | block | clients in an auto block "
    "| auto | block / central | auto / central | loop / auto |",
    "ragged": "| LLaMA | clients | batch | tokens a step | padded / real | loop | one by one | block "
    "| clients in an auto block | auto | loop / auto | one by one / auto | loop / block |",
    "budget": "| LLaMA | batch | tokens | clients in a block | tokens a step | 16 clients | against blocks of one |",
}
TITLES = {"equal": "equal lengths", "ragged": "questions and answers", "budget": "how many tokens a step should have"}


def cells_of(kind: str, options: argparse.Namespace) -> Iterator[list[str]]:
    """Measure every cell that was asked for, a few rows at a time."""
    for shape in options.shapes:
        model = loaded(shape, options.device, options.dtype)
        for batch in options.batches:
            if kind == "budget":
                for length in options.lengths:
                    yield budget_rows(model, shape, batch, length, options.repeats)
                continue
            for clients in options.clients:
                for length in options.lengths if kind == "equal" else [70 if options.drawn else 90]:
                    tokens = clients * batch * length
                    if not options.least <= tokens <= (options.most or MOST[shape]):
                        continue
                    repeats = options.repeats if tokens > 512 else 2 * options.repeats - 1
                    if kind == "equal":
                        yield [equal_row(model, shape, clients, batch, length, repeats)]
                    else:
                        rows = drawn(SHAPES[shape][-1]) if options.drawn else questions(options.data)
                        yield [ragged_row(model, shape, clients, batch, repeats, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["5M", "25M", "110M"], choices=SHAPES)
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="of --ragged")
    parser.add_argument("--drawn", action="store_true", help="lengths drawn instead of those of --data")
    parser.add_argument("--most", type=int, help="tokens of a step; cells with more are left out, MOST when not given")
    parser.add_argument("--least", type=int, default=0, help="tokens of a step; cells with fewer are left out")
    parser.add_argument("--budget", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="over 512 tokens a step; 2 n - 1 below")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--name", default="", help="appended to the name of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kind = "ragged" if options.ragged else "budget" if options.budget else "equal"
    for lines in cells_of(kind, options):
        print("\n".join(lines), flush=True)
        write(kind, lines, options)


def kept(page: Path, lines: list[str], keys: int) -> list[str]:
    """Return the rows of a page with new ones in their places; the first cells are a row's name."""

    def name(line: str) -> tuple[str, ...]:
        return tuple(line.split(" | ")[:keys])

    old = page.read_text(encoding="utf8").splitlines() if page.exists() else []
    rows = {name(line): line for line in old if line.startswith("| ")}
    rows = dict(list(rows.items())[1:])  # without the head
    return list((rows | {name(line): line for line in lines}).values())


def write(kind: str, lines: list[str], options: argparse.Namespace) -> None:
    cpu = f"one thread of {os.cpu_count()} cores ({platform.machine()})"
    where = cpu if options.device == "cpu" else torch.cuda.get_device_name()
    what = "CPU milliseconds" if options.device == "cpu" else "milliseconds"
    text_of = "drawn" if options.drawn else options.data.parent.name
    told = "" if kind != "ragged" else "; the lengths are drawn" if options.drawn else f"; the text is {text_of}"
    head, few = KINDS[kind], f"medians of {options.repeats} interleaved"
    more = "" if kind == "budget" else f", of {2 * options.repeats - 1} up to 512 tokens a step"
    text = (
        f"# The engine: {TITLES[kind]}\n\n{what} of one step of all clients, LoRA r=8 on q and v, AdamW, clipping, "
        f"{options.dtype}; {few}{more}{told}. Machine: {where}, torch {torch.__version__}. Written by `python "
        f"benchmarks/engine.py{'' if kind == 'equal' else f' --{kind}'}{' --drawn' if options.drawn else ''}`, which "
        "says what the columns are.\n\n"
        f"{head}\n|{'---|' * (head.count('|') - 1)}\n"
    )
    page = RESULTS / f"engine_{kind}{f'_{text_of}' if kind == 'ragged' else ''}{options.name}.md"
    rows = kept(page, lines, {"equal": 4, "ragged": 3, "budget": 4}[kind])
    page.write_text(text + "\n".join(rows) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
