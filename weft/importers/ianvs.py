"""Ianvs' federated LLM example -> a job and a suite: benchmarkingjob.yaml with the files that it names.

The grid of hyper-parameters becomes the grid of the suite, its aggregators `fedavg` and `fedavgm`, its PEFT methods
`lora` and `prefix` (what the example calls P-Tuning is version 2), and `weft bench` writes all_rank.csv in the same
columns. Nothing of the source is changed: the job names the columns of the data, where Ianvs rewrites the file.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from weft.core.errors import JobError
from weft.importers.imported import Notes, leaves, read_mapping, write

AGGREGATIONS = {"FedAvg-PEFT": "fedavg", "FedAvgM-PEFT": "fedavgm"}
METRICS = {"rouge1_metric": "rouge1", "rouge2_metric": "rouge2", "rougel_metric": "rougeL", "bleu4_metric": "bleu4"}
DEFAULTS = {
    "batch_size": 16,
    "local_epochs": 1,
    "learning_rate": 5e-5,
    "peft_method": "lora",
}  # model.py of the example
JOINT = ("chatglm", "bloom", "gpt_neox", "falcon")  # families whose queries, keys and values are one layer
LONGEST = 1024
PREFIX = 20

LEFT = {
    "testenv.backend": "the deep learning framework; here torch",
    "testenv.dataset.name": "a label, ignored there too",
    "testenv.gpu_num": "threads, one a GPU; here one process trains blocks of clients on the device that is there",
    "testenv.use_gpu": "here a GPU is used where there is one",
    "testenv.if_mode_llm": "tells Ianvs which of its paths to take",
    "testenv.incremental_rounds": "of lifelong learning; federated fine-tuning does not read it",
    "testenv.model_eval": "triggers a retraining in other paradigms; not read here",
    "benchmarkingjob.simulation": "a Kubernetes simulation of cloud and edge; here `weft run` simulates in one process",
    "benchmarkingjob.rank.visualization": "prints a table; `weft bench` prints one too, and writes a page",
    "algorithm.paradigm_type": "federatedlearning is the only one here",
    "algorithm.fl_data_setting.train_ratio": "the share of the training file that is used; here all, or data.limit",
    "algorithm.fl_data_setting.splitting_method": "how that share is taken",
    "algorithm.fl_data_setting.label_data_ratio": "the labelled share; an answer is the label here, so all of it",
    "algorithm.fl_data_setting.data_partition": "not read for language models there: the split is IID",
    "algorithm.fl_data_setting.non_iid_ratio": "not read for language models there; here see the split `dirichlet`",
    "save_dir": "where each client writes its adapter, over the last one's; here the global one is in the run folder",
    "model_name": "a name on the hub, which initial_model_url overrules",
    "other_hyperparameters": "files with more hyper-parameters, which are not read; put their keys into the job",
}


@dataclass(frozen=True)
class Case:
    """One test case of Ianvs: an algorithm with one value of every hyper-parameter."""

    algorithm: str
    modules: Mapping[str, str]
    """Module type -> its name."""
    values: Mapping[str, Any]
    """`<module type>-<hyper-parameter>` -> value."""
    url: str
    paradigm: str

    def value(self, name: str, module: str = "basemodel") -> Any:
        """Return a hyper-parameter, or the example's own default."""
        return self.values.get(f"{module}-{name}", DEFAULTS.get(name))


def import_ianvs(
    path: Path, out: Path, *, model: str | None = None, train: str | None = None, test: str | None = None
) -> Notes:
    """Write `out`/job.yaml, suite.yaml and what became of every key; the source is only read.

    model, train, test: take these in place of the source's.
    """
    notes = Notes()
    whole = _section(path, "benchmarkingjob")
    env_path = _place(whole.get("testenv"), path, "benchmarkingjob.testenv")
    env = _section(env_path, "testenv")
    cases = list(_cases(whole, path, notes))
    name = model or _base(cases[0], path)
    data = env.get("dataset") or {}
    sources = {
        "train": train or _data(data, "train", env_path, path),
        "test": test or _data(data, "test", env_path, path),
    }
    job = _job(env, cases[0], name, sources, notes)
    first = _changes(cases[0], name)
    grid = {label: _changes(case, model or _base(case, path)) for label, case in _named(cases).items()}
    suite = {
        "job": "job.yaml",
        "grid": {"case": grid},
        "seeds": [0],
        "rank_by": _rank_by(whole),
        "ianvs": _rank(whole, cases, path),
    }
    _account("benchmarkingjob", whole, notes)
    _account("testenv", env, notes)
    if model:
        notes.changed["basemodel-model_name"] = f"the base gave way to {model}"
    write(out, {"job.yaml": job | _nested(first), "suite.yaml": suite}, notes, path.name)
    return notes


def _section(path: Path, name: str) -> dict[str, Any]:
    found = read_mapping(path, name).get(name)
    if not isinstance(found, dict):
        raise JobError(f"{path}: has no key `{name}`; name the {name}.yaml of an Ianvs example")
    return found


def _place(value: Any, beside: Path, key: str) -> Path:
    """Find a file that Ianvs names: from where the command runs, else from the file's folder or one above it."""
    if not isinstance(value, str):
        raise JobError(f"{beside.name}: {key} is missing; it names a file")
    folders = [Path.cwd(), *beside.resolve().parents]
    for folder in folders:
        if (folder / value).exists():
            return folder / value
    raise JobError(
        f"{beside.name}: {key}: there is no {value}, neither from here nor from a folder above {beside.name}"
    )


def _cases(whole: Mapping[str, Any], path: Path, notes: Notes) -> Iterator[Case]:
    """Yield every test case: all values of all hyper-parameters with each other."""
    listed = (whole.get("test_object") or {}).get("algorithms")
    if not isinstance(listed, list) or not listed:
        raise JobError(f"{path.name}: benchmarkingjob.test_object.algorithms is empty; it lists what is compared")
    for entry in listed:
        file = _place(entry.get("url"), path, "algorithms.url")
        algorithm = _section(file, "algorithm")
        _account("algorithm", {k: v for k, v in algorithm.items() if k != "modules"}, notes)
        modules = {str(module["type"]): str(module["name"]) for module in algorithm.get("modules") or ()}
        choices = [
            (f"{module['type']}-{name}", list(given.get("values") or ()))
            for module in algorithm.get("modules") or ()
            for parameter in module.get("hyperparameters") or ()
            for name, given in parameter.items()
        ]
        _parameters(choices, notes)
        for values in product(*(found for _, found in choices)):
            named = {name: value for (name, _), value in zip(choices, values, strict=True)}
            paradigm = str(algorithm.get("paradigm_type", ""))
            yield Case(str(entry.get("name", file.stem)), modules, named, str(entry.get("url")), paradigm)


CARRIED = {
    "batch_size": "local.batch",
    "learning_rate": "local.lr",
    "local_epochs": "local.epochs",
    "initial_model_url": "model.name",
    "beta": "algorithm.fedavgm.momentum",
    "server_lr": "algorithm.fedavgm.lr",
}


def _parameters(choices: Sequence[tuple[str, Sequence[Any]]], notes: Notes) -> None:
    for key, values in choices:
        name = key.partition("-")[2]
        if name in CARRIED:
            notes.carried[key] = f"{CARRIED[name]} ({', '.join(map(str, values))})"
        elif name == "peft_method":
            notes.changed[key] = (
                "lora: LoRA of rank 8, alpha 32, dropout 0.05 on queries, keys and values, as its code "
            )
            notes.changed[key] += "fixes them; ptuning: a prefix of 20 keys and values in every layer (P-Tuning v2)"
        else:
            notes.left[key] = f"{', '.join(map(str, values))}; {LEFT.get(name, 'unknown to Weft and to the example')}"


def _base(case: Case, path: Path) -> str:
    """Return the base model: a folder that is there, as a path of its own, else its name on the hub."""
    for name in ("initial_model_url", "model_name"):
        value = case.value(name)
        if not value:
            continue
        for folder in (Path.cwd(), *path.resolve().parents):
            if (folder / value).is_dir():
                return str((folder / value).resolve())
        if name == "model_name" or not case.value("model_name"):
            return str(value)
    raise JobError(f"{path.name}: no model is named; give initial_model_url or model_name, or --model")


def _data(data: Mapping[str, Any], which: str, env: Path, path: Path) -> str:
    value = data.get(f"{which}_data") or data.get(f"{which}_url") or data.get(f"{which}_index")
    try:
        return str(_place(value, env, f"testenv.dataset.{which}_data").resolve())
    except JobError:
        return str(_place(value, path, f"testenv.dataset.{which}_data").resolve())


def _columns(file: str) -> dict[str, str]:
    """Return which columns are question and answer: the first two, whatever their names."""
    with open(file, encoding="utf8", newline="") as text:
        if file.endswith(".csv"):
            names = next(csv.reader(text), [])
        else:
            try:
                names = list(json.loads(text.readline()))
            except ValueError:
                raise JobError(f"{file}: its first line is not a JSON object, so its columns are not known") from None
    if len(names) < 2:
        raise JobError(f"{file}: needs two columns, a question and an answer")
    return {standard: own for standard, own in zip(("question", "answer"), names[:2], strict=True) if standard != own}


def _job(env: Mapping[str, Any], case: Case, name: str, sources: Mapping[str, str], notes: Notes) -> dict[str, Any]:
    """Return the base job: what all cases have in common."""
    room = _config(name).get("max_position_embeddings")
    longest = min(LONGEST, room - PREFIX) if isinstance(room, int) else LONGEST
    said = "" if longest == LONGEST else f", cut to the base's {room} positions less a prefix of {PREFIX}"
    notes.changed["(in the example's code)"] = (
        f"AdamW, gradients clipped at 1, {LONGEST} tokens an example{said}, {LONGEST} new tokens, greedy; a seed, "
        "which the example does not set"
    )
    notes.changed["(the data)"] = (
        "the first two columns are question and answer, by name in data.columns; the file stays"
    )
    for key, said in {
        "testenv.round": "rounds", "testenv.client_number": "data.split.iid.clients",
        "testenv.dataset.train_data": "data.train", "testenv.dataset.test_data": "data.test",
        "testenv.metrics": "evaluate.on",
    }.items():  # fmt: skip
        notes.carried[key] = said
    return {
        "model": {"name": name},
        "adapter": "lora",
        "task": {"causal_lm": {"template": "{question}", "max_length": longest}},
        "data": {
            **sources,
            "columns": _columns(sources["train"]),
            "split": {"iid": {"clients": int(env.get("client_number", 1))}},
        },
        "local": {"optimizer": "adamw", "clip": 1.0},
        "rounds": int(env.get("round", 1)),
        "evaluate": {"every": 1, "on": ["loss", "rouge", "bleu"], "max_new_tokens": LONGEST},
        "baselines": ["untrained"],
    }


def _config(name: str) -> dict[str, Any]:
    file = Path(name) / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    return found


def _changes(case: Case, name: str) -> dict[str, Any]:
    """Return what a case changes in the base job."""
    method = case.value("peft_method")
    family = _config(name).get("model_type", "chatglm" if "chatglm" in name.lower() else "")
    targets = ["query_key_value"] if family in JOINT else ["q_proj", "k_proj", "v_proj"]
    adapters: dict[str, Any] = {
        "lora": {"lora": {"rank": 8, "alpha": 32, "dropout": 0.05, "targets": targets}},
        "ptuning": {"prefix": {"tokens": PREFIX, "projection": False}},
    }
    if method not in adapters:
        raise JobError(f"peft_method: `{method}` is not of this example (lora, ptuning)")
    aggregation = case.modules.get("aggregation", "FedAvg-PEFT")
    if aggregation not in AGGREGATIONS:
        raise JobError(f"aggregation `{aggregation}` is not of this example ({', '.join(AGGREGATIONS)})")
    beta, rate = case.value("beta", "aggregation"), case.value("server_lr", "aggregation")
    keys = {"momentum": 0.7 if beta is None else float(beta), "lr": 1.0 if rate is None else float(rate)}
    return {
        "model.name": name,
        "adapter": adapters[method],
        "local.batch": int(case.value("batch_size")),
        "local.lr": float(case.value("learning_rate")),
        "local.epochs": int(case.value("local_epochs")),
        "algorithm": {"fedavgm": keys} if AGGREGATIONS[aggregation] == "fedavgm" else {"fedavg": {}},
    }


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first case's own keys for the base job, so that `weft run` takes it alone; the rest is the grid's."""
    return {key: value for key, value in changes.items() if "." not in key}


def _named(cases: Sequence[Case]) -> dict[str, Case]:
    """Name the cases: by algorithm, with what tells those of one algorithm apart."""
    varied = {key for case in cases for key in case.values if len({str(other.values.get(key)) for other in cases}) > 1}
    found: dict[str, Case] = {}
    for case in cases:
        own = ", ".join(f"{key.partition('-')[2]} {case.values[key]}" for key in case.values if key in varied)
        label = " ".join(filter(None, [case.algorithm, own]))
        found[label if label not in found else f"{label} ({len(found) + 1})"] = case
    return found


# --- the ranking


def _sorting(whole: Mapping[str, Any]) -> list[list[str]]:
    listed = (whole.get("rank") or {}).get("sort_by") or []
    return [[str(name), str(way)] for entry in listed for name, way in entry.items()]


def _rank_by(whole: Mapping[str, Any]) -> str:
    first = next(iter(_sorting(whole)), ["rouge1_metric", ""])[0]
    return METRICS.get(first, "rouge1")


def _rank(whole: Mapping[str, Any], cases: Sequence[Case], path: Path) -> dict[str, Any]:
    """Return what `weft bench` needs to write all_rank.csv and selected_rank.csv."""
    rank = whole.get("rank") or {}
    old = Path(str(whole.get("workspace", "."))) / str(whole.get("name", "benchmarkingjob")) / "rank" / "all_rank.csv"
    found = [folder / old for folder in (Path.cwd(), *path.resolve().parents) if (folder / old).is_file()]
    return {
        "existing": str(found[0].resolve()) if found else None,
        "metrics": list(METRICS),
        "sort_by": _sorting(whole),
        "selected": rank.get("selected_dataitem") or {},
        "cases": {
            label: {
                "algorithm": case.algorithm,
                "paradigm": case.paradigm,
                "modules": dict(case.modules),
                "hyperparameters": dict(case.values),
                "url": case.url,
            }
            for label, case in _named(cases).items()
        },
    }


KEPT = ("benchmarkingjob.rank.sort_by", "benchmarkingjob.rank.selected_dataitem", "benchmarkingjob.test_object",
        "benchmarkingjob.testenv", "benchmarkingjob.name", "benchmarkingjob.workspace")  # fmt: skip


def _account(section: str, values: Mapping[str, Any], notes: Notes) -> None:
    """Name what became of every key of a file that nothing has been said of yet."""
    for key, value in leaves(values, section):
        known = next((place for place in LEFT if key == place or key.startswith(f"{place}.")), None)
        if key in notes.carried or key in notes.changed:
            continue
        if any(key == place or key.startswith(f"{place}.") for place in KEPT):
            notes.carried.setdefault(key, "the suite, and its rank files")
        elif key == "benchmarkingjob.rank.save_mode":
            notes.changed[key] = "both all_rank.csv and selected_rank.csv are written, no picture"
        else:
            notes.left[key] = f"{value!r}; {LEFT[known] if known else 'unknown to Ianvs as to Weft: ignored by both'}"
