"""A tiny model with an adapter, ready for DP-SGD, and private draws for its clients."""

import copy
from dataclasses import replace
from typing import Any

import torch

from weft.core import trees
from weft.core.task import Example, Task
from weft.core.types import Gradient, Tensors
from weft.job import Job
from weft.plugins import build
from weft.site.cohort import Cohort, Mode
from weft.site.dpsgd import DpSgd, Draws
from weft.site.model import equip
from weft.site.recipe import Recipe
from weft.site.secret import Secret
from weft.testing.families import tiny
from weft.testing.tiny import RECORDS, model, tokenizer

SECRET = Secret(bytes(range(32)))
DATA = {"train": "train.jsonl", "split": {"by": "site"}}
KEYS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "targets": "all-linear"},
    "bottleneck": {"size": 3},
    "prompt": {"tokens": 3},
    "prefix": {"tokens": 3},
}


def recipe(clip: float = 0.05, noise: float = 1.0, **changes: Any) -> Recipe:
    plain: dict[str, Any] = {
        "optimizer": "sgd", "lr": 1.0, "batch": 4, "accumulate": 1, "epochs": 1, "steps": 1, "warmup": 0.0,
        "schedule": "constant", "clip": None, "weight_decay": 0.0, "momentum": 0.0, "moments": "reset",
        "checkpointing": False, "rounds": 10, "dp": DpSgd(clip, noise),
    }  # fmt: skip
    return Recipe(**{**plain, **changes})


def cohort(adapter: str = "lora", task: str = "causal_lm", mode: Mode = "padded", **keys: Any) -> Cohort:
    """Return an engine in float64 over a tiny Llama (a tiny GPT-2 where biases are trained).

    Llama's own norms still round to float32.
    """
    job = Job(model={"name": "tiny"}, adapter={adapter: {**KEYS.get(adapter, {}), **keys}}, task=task, data=DATA)
    made: Task = build(job.task, "task")
    base: Any = copy.deepcopy(tiny("gpt2", made.auto)) if adapter == "bitfit" else model(made.auto, labels=4)
    loaded = equip(base, tokenizer(), build(job.adapter, "adapter"), made, 7)
    loaded.net.double()
    loaded.initial = {name: at[0][0]._parameters[at[0][1]] for name, at in loaded.places.items()}
    return Cohort(loaded, made, recipe(), 3, mode, loaded.lift)


def examples(engine: Cohort, count: int, first: int = 0) -> list[Example]:
    """Return encoded records of unlike lengths."""
    records = RECORDS[first : first + count]
    return engine.task.encode(engine.loaded.tokenizer, records, ("bread", "card", "engine", "rain")).examples


def start(engine: Cohort, clients: int = 1) -> Tensors:
    """Return unlike adapters, away from the start's zeros, where most gradients would be zero too."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: p.detach().repeat(clients, *[1] * p.dim())
        + 0.1 * torch.randn(clients, *p.shape, generator=draw, dtype=p.dtype)
        for name, p in engine.loaded.initial.items()
    }


def draws(client: str = "a", round_: int = 1, start_: str = "start", secret: Secret = SECRET) -> Draws:
    return Draws(secret, (round_, client, start_))


def trained(
    engine: Cohort,
    data: dict[str, list[Example]],
    *,
    gradient: Gradient | None = None,
    given: dict[str, Draws] | None = None,
    round_: int = 1,
    **changes: Any,
) -> Tensors:
    """Train clients together from `start`, with a recipe of these changes."""
    own = given or {name: draws(name, round_) for name in data}
    engine = replace(engine, recipe=recipe(**changes))
    return engine.train(round_, data, start(engine, len(data)), {}, gradient, own).params


def flat(tree: Tensors) -> torch.Tensor:
    """Return (clients, *shape) tensors as (clients, numbers), in name order."""
    return torch.cat([tree[name].flatten(1) for name in sorted(tree)], 1)


def moved(engine: Cohort, data: dict[str, list[Example]], **changes: Any) -> torch.Tensor:
    """Return what one step of rate 1 took away from each client's adapter, (clients, numbers)."""
    return flat(trees.subtract(start(engine, len(data)), trained(engine, data, **changes)))
