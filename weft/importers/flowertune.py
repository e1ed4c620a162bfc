"""FlowerTune's pyproject.toml -> a job: the federated instruction tuning of Flower's examples and leaderboards."""

import tomllib
from pathlib import Path
from typing import Any

from weft.core.errors import JobError
from weft.importers.imported import Notes, leaves, write

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n### Instruction:\n{instruction}\n### Response:"
)
ARGUMENTS = "train.training-arguments."
CARRIED = {
    "model.name": "model.name",
    "model.lora.peft-lora-r": "adapter.lora.rank",
    "model.lora.peft-lora-alpha": "adapter.lora.alpha",
    "model.lora.peft-use-dora": "adapter.lora.dora",
    "model.gradient-checkpointing": "local.checkpointing",
    "dataset.name": "data.train",
    "train.seq-length": "task.causal_lm.max_length",
    "train.learning-rate-max": "local.lr, the peak",
    "num-server-rounds": "rounds",
    ARGUMENTS + "per-device-train-batch-size": "local.batch",
    ARGUMENTS + "gradient-accumulation-steps": "local.accumulate",
    ARGUMENTS + "max-steps": "local.steps",
    ARGUMENTS + "gradient-checkpointing": "local.checkpointing",
}
LEFT = {
    "model.quantization": "loads the base in so many bits; here it is bfloat16, see model.dtype",
    "train.learning-rate-min": "the learning rate's floor; here the cosine falls to 0 over the whole run",
    "train.save-every-round": "saves an adapter every so many rounds; here a checkpoint is kept after each round, and "
    "the last adapter is exported",
    "train.dynamic-data-seed": "draws other examples in each run; here the seed decides every draw",
    "strategy.fraction-evaluate": "clients that evaluate; here the test records are measured as `evaluate` says",
    ARGUMENTS + "output-dir": "where the trainer writes; here `weft run --out`",
    ARGUMENTS + "learning-rate": "filled in at every round; here local.lr with its schedule",
    ARGUMENTS + "logging-steps": "how often the trainer logs; here the journal has a line a round",
    ARGUMENTS + "num-train-epochs": "passes over the data, without effect beside max-steps",
    ARGUMENTS + "save-steps": "how often the trainer saves; a client saves nothing between rounds here",
    ARGUMENTS + "save-total-limit": "how many of those are kept",
    ARGUMENTS + "lr-scheduler-type": "of the steps within a round; here one schedule spans the run",
}


def import_flowertune(
    path: Path,
    out: Path,
    *,
    model: str | None = None,
    train: str | None = None,
    test: str | None = None,
    clients: int = 20,
) -> Notes:
    """Write `out`/job.yaml and what became of every key; the source is only read.

    model, train, test: take these in place of the source's. clients: Flower keeps their number outside the file.
    """
    config = _config(path)
    given = dict(leaves(config))
    notes = Notes()
    job = _job(given, notes, model, train, test, clients)
    _account(given, notes)
    write(out, {"job.yaml": job}, notes, path.name)
    return notes


def _config(path: Path) -> dict[str, Any]:
    try:
        whole = tomllib.loads(path.read_text(encoding="utf8"))
        config: dict[str, Any] = whole["tool"]["flwr"]["app"]["config"]
    except FileNotFoundError:
        raise JobError(f"there is no file {path}; name the pyproject.toml of a Flower app") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path}: this is not TOML: {error}") from None
    except (KeyError, TypeError):
        raise JobError(f"{path}: has no [tool.flwr.app.config]; name the pyproject.toml of a FlowerTune app") from None
    static = config.pop("static", {})  # of the leaderboards: what their rules fix
    return _merged(config, static)


def _merged(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    for key, value in right.items():
        inside = left.get(key)
        left[key] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return left


def _job(
    given: dict[str, Any], notes: Notes, model: str | None, train: str | None, test: str | None, clients: int
) -> dict[str, Any]:
    name = model or given.get("model.name")
    source = train or given.get("dataset.name")
    if not name or not source:
        raise JobError("model.name and dataset.name must stand in [tool.flwr.app.config], or be given by option")
    fraction = float(given.get("strategy.fraction-train", given.get("strategy.fraction-fit", 1.0)))
    per_round = max(1, int(fraction * clients))
    job: dict[str, Any] = {
        "model": {"name": _placed(name), "dtype": "bfloat16"},
        "adapter": {"lora": _lora(given)},
        "task": {"causal_lm": {"template": PROMPT, "max_length": int(given.get("train.seq-length", 512))}},
        "data": {"train": _placed(source), "split": {"iid": {"clients": clients}}},
        "clients": {"per_round": per_round},
        "local": _local(given),
        "algorithm": "fedavg",
        "pipeline": [{"weigh": {"by": "examples"}}],
        "rounds": int(given.get("num-server-rounds", 100)),
        "evaluate": {"every": 0, "on": ["loss"]},
    }
    if test:
        job["data"]["test"] = _placed(test)
    else:
        notes.left["(no key)"] = "FlowerTune measures elsewhere; set data.test to a file of held-out records"
    _told(notes, given, clients, per_round, model, train)
    return job


def _placed(name: str) -> str:
    """Return a local file or folder as an absolute path, and a name of the hub as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _lora(given: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "rank": int(given.get("model.lora.peft-lora-r", 32)),
        "alpha": float(given.get("model.lora.peft-lora-alpha", 64)),
        "dropout": 0.075,
        "targets": ["q_proj", "v_proj"],
    }
    return keys | ({"dora": True} if given.get("model.lora.peft-use-dora") else {})


def _local(given: dict[str, Any]) -> dict[str, Any]:
    checkpointing = given.get(ARGUMENTS + "gradient-checkpointing", given.get("model.gradient-checkpointing", False))
    return {
        "optimizer": "adamw",
        "lr": float(given.get("train.learning-rate-max", 5e-5)),
        "batch": int(given.get(ARGUMENTS + "per-device-train-batch-size", 16)),
        "accumulate": int(given.get(ARGUMENTS + "gradient-accumulation-steps", 1)),
        "steps": int(given.get(ARGUMENTS + "max-steps", 10)),
        "schedule": "cosine",
        "clip": 1.0,
        "checkpointing": bool(checkpointing),
    }


def _told(notes: Notes, given: dict[str, Any], clients: int, per_round: int, *replaced: str | None) -> None:
    """Say what the app has in its code rather than in the file, and what was taken in place of the file's."""
    for key, value in zip(("model.name", "dataset.name"), replaced, strict=True):
        if value:
            notes.changed[key] = f"{given.get(key)} gave way to {value}"
    key = "strategy.fraction-train" if "strategy.fraction-train" in given else "strategy.fraction-fit"
    if key in given:
        notes.changed[key] = f"clients.per_round is {per_round}: this share of {clients} clients, a number that Flower "
        notes.changed[key] += "keeps outside the file (--clients)"
    notes.left["tool.flwr.app.components"] = "the app's own code, which is not run"
    notes.changed["(in the app's code)"] = (
        "LoRA dropout 0.075 on q_proj and v_proj, its Alpaca prompt, an IID split, FedAvg weighted by examples, "
        "gradients clipped at 1"
    )


def _account(given: dict[str, Any], notes: Notes) -> None:
    """Name what became of every key that nothing has been said of yet."""
    for key, value in given.items():
        if key in notes.changed:
            continue
        if key in CARRIED:
            notes.carried[key] = f"{CARRIED[key]} ({value!r})"
        else:
            meaning = LEFT.get(key, "a key of the app, unknown to Weft: the job does without it")
            notes.left[key] = f"{value!r}; {meaning}"
