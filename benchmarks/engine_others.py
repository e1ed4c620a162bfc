"""A round of 8 clients against plain peft and Hugging Face's Trainer, as most simulations train them.

    python benchmarks/engine_others.py [--cells 5M:1 5M:4 25M:2] [--device cuda --dtype bfloat16 --cells 0.6B:4]

Each client takes four AdamW steps on its own questions and answers (the lengths of `engine.py --ragged`), the same
examples in the same order everywhere; then the adapters are averaged. In turn A B C, medians after a warm-up, one
thread, process CPU time (wall time on a GPU). The averages of all three must agree.

- peft: one client after another; the adapter is copied in and out with peft's state dicts, a DataLoader pads, the loss
  is the model's own, a new torch AdamW for each client
- trainer: the same with a new transformers.Trainer for each client (no logging, no saving)
- weft: the blocks that a site makes

Writes benchmarks/results/engine_others.md.
"""

import argparse
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from engine import MEDQUAD, auto, measure, padded, questions, recipe
from engine import loaded as loaded_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from weft.core import trees
from weft.core.task import Example
from weft.core.types import Tensors
from weft.site.cohort import Cohort
from weft.site.model import DTYPES, Loaded
from weft.site.recipe import batches
from weft.tasks.causal_lm import causal_lm

PAGE = Path(__file__).parent / "results/engine_others.md"
CLIENTS, STEPS, SEED = 8, 4, 0
Round = Callable[[], Tensors]


class Ordered(transformers.Trainer):  # type: ignore[misc]
    """A Trainer that takes the examples in the order in which they are given."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def collate(rows: list[Example]) -> dict[str, Tensor]:
    return padded(rows, torch.device("cpu"))


def data_of(batch: int) -> dict[str, list[Example]]:
    """Return each client's own questions, shortest clients first, as a site orders them."""
    rows, size = questions(MEDQUAD), batch * STEPS
    own = [rows[k * size : (k + 1) * size] for k in range(CLIENTS)]
    return {f"c{k}": part for k, part in enumerate(sorted(own, key=lambda p: sum(len(row["ids"]) for row in p)))}


def in_order(data: dict[str, list[Example]], batch: int) -> dict[str, list[Example]]:
    """Return each client's examples in the order in which Weft takes them."""
    taken = {name: batches(len(rows), recipe(batch, STEPS), SEED, 1, name) for name, rows in data.items()}
    return {name: [data[name][i] for step in steps for i in step] for name, steps in taken.items()}


def averaged(parts: list[Tensors]) -> Tensors:
    return {name: torch.stack([part[name].float().cpu() for part in parts]).mean(0) for name in parts[0]}


def weft_round(model: Loaded, data: dict[str, list[Example]], batch: int) -> Round:
    """Return Weft's round, in packed blocks."""
    cohort = Cohort(model, causal_lm(), recipe(batch, STEPS), SEED, "packed", model.lift)
    start, names = {name: p.detach().cpu() for name, p in model.initial.items()}, list(data)
    mean = max(sum(len(row["ids"]) for row in rows) / len(rows) for rows in data.values())
    size = auto(model, batch * mean)

    def run() -> Tensors:
        parts = []
        for at in range(0, len(names), size):
            part = {name: data[name] for name in names[at : at + size]}
            out = cohort.train(1, part, trees.expand(start, len(part)), {}, None).params
            parts += [trees.pick(out, k) for k in range(len(part))]
        return {name.replace(".default", ""): value for name, value in averaged(parts).items()}

    return run


def copied(net: Any, ordered: dict[str, list[Example]], train: Callable[[list[Example]], None]) -> Round:
    """Return a round that copies the adapter in and out with peft's state dicts."""
    start = {name: value.clone() for name, value in get_peft_model_state_dict(net).items()}

    def run() -> Tensors:
        parts = []
        for rows in ordered.values():
            set_peft_model_state_dict(net, start)
            train(rows)
            parts.append({name: value.clone() for name, value in get_peft_model_state_dict(net).items()})
        set_peft_model_state_dict(net, start)
        return averaged(parts)

    return run


def peft_round(model: Loaded, ordered: dict[str, list[Example]], batch: int) -> Round:
    """Return the round of a plain loop."""
    net = model.net

    def train(rows: list[Example]) -> None:
        net.train()
        params = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
        for part in DataLoader(rows, batch_size=batch, collate_fn=collate):  # type: ignore[arg-type]
            net(**{name: value.to(model.device) for name, value in part.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return copied(net, ordered, train)


def trainer_round(model: Loaded, ordered: dict[str, list[Example]], batch: int, folder: str) -> Round:
    """Return the round of a Trainer for each client."""

    def train(rows: list[Example]) -> None:
        options = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=STEPS, learning_rate=1e-3,
            lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", use_cpu=model.device.type == "cpu", remove_unused_columns=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Ordered(model=model.net, args=options, train_dataset=rows, data_collator=collate)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    return copied(model.net, ordered, train)


def row_of(shape: str, batch: int, repeats: int, device: str, dtype: str) -> str:
    """Measure one shape."""
    model, data = loaded_model(shape, device, dtype), data_of(batch)
    ordered = in_order(data, batch)
    with tempfile.TemporaryDirectory() as folder:
        rounds: dict[str, Round] = {
            "peft": peft_round(model, ordered, batch),
            "trainer": trainer_round(model, ordered, batch, folder),
            "weft": weft_round(model, data, batch),
        }
        ends = {name: run() for name, run in rounds.items()}
        got = measure(rounds, repeats, device)  # type: ignore[arg-type]
    apart = max(float((end[name] - value).abs().max()) for end in ends.values() for name, value in ends["weft"].items())
    moved = max(float((value - model.initial[name.replace("weight", "default.weight")].detach().cpu()).abs().max())
                for name, value in ends["weft"].items())  # fmt: skip
    tokens = sum(len(row["ids"]) for rows in data.values() for row in rows) // (CLIENTS * STEPS)
    return (
        f"| {shape} | {batch} | {tokens} | {got['peft']:.0f} | {got['trainer']:.0f} | {got['weft']:.0f} "
        f"| {got['peft'] / got['weft']:.2f} | {got['trainer'] / got['weft']:.2f} | {apart:.1e} | {moved:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=["5M:1", "5M:4", "25M:2"], help="shape:batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    lines = []
    for cell in options.cells:
        shape, batch = cell.split(":")
        lines.append(row_of(shape, int(batch), options.repeats, options.device, options.dtype))
        print(lines[-1], flush=True)
    where = f"one thread of {os.cpu_count()} cores ({platform.machine()})"
    where = where if options.device == "cpu" else torch.cuda.get_device_name()
    options.page.write_text(
        f"# A round against plain peft and Trainer\n\nMilliseconds ({'CPU' if options.device == 'cpu' else 'wall'}) "
        f"of a round of {CLIENTS} clients, {STEPS} steps each, LoRA r=8 on q and v, {options.dtype}; medians of "
        f"{options.repeats}. Machine: {where}, torch {torch.__version__}, transformers {transformers.__version__}. "
        "Written by `python benchmarks/engine_others.py`, which says what is compared. `apart` is the largest "
        "difference of an averaged number between the three, `moved` how far training moved one.\n\n"
        "| LLaMA | batch | tokens a client's step | peft | trainer | weft | peft / weft | trainer / weft | apart "
        "| moved |\n|---|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n",
        encoding="utf8",
    )


if __name__ == "__main__":
    main()
