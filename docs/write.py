"""Write what README.md and docs/ say of the code: the tree, the tables of keys and plug-ins, the results.

    python docs/write.py                    write every marked part anew
    python docs/write.py --check            change nothing; fail where a part is out of date
    python docs/write.py medquad=runs/demo  first take over a finished run's results as docs/results/medquad.json

A part stands between `<!-- name -->` and `<!-- /name -->`; whatever stands outside is written by hand.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from weft import job, journal, plugins
from weft.explain import explain

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "jobs.md")
WIDE, INDENT = 116, 22  # columns of the tree, and of its names
SHORT = 20  # a comment with fewer characters says too little

# --- the tree

FOLDERS = {
    "weft/core": "pure: imports torch, and nothing else of Weft",
    "weft/algorithms": "one file = one paper",
    "weft/samplers": "one file = one way to choose whom a round asks",
    "weft/paces": "one file = one way not to wait for all",
    "weft/transforms": "one file = one step between a client's update and the server, both halves",
    "weft/adapters": "one file = one PEFT method",
    "weft/tasks": "one file = one task: records -> batch, loss, metrics",
    "weft/data": "read and check records; one file = one way to split them among clients",
    "weft/site": "what a machine with data does: trains a stack of clients over one frozen base",
    "weft/secure": "secure aggregation: one file a half, a message, a primitive; pure of any network",
    "weft/links": "how orders and replies travel",
    "weft/deploy": "the same job between real sites",
    "weft/audit": "attacks on what is promised of privacy, each with a number",
    "weft/report": "run folder -> one self-contained page",
    "weft/suite": "a grid of jobs -> runs -> a leaderboard that says what is noise",
    "weft/plan": "what a job will take, from the model's config alone",
    "weft/importers": "another framework's configuration -> a job, every key named",
    "weft/trackers": "the rows of a run -> TensorBoard, MLflow, Weights & Biases",
    "weft/testing": "the checks that every plug-in passes, yours too (public)",
    "tests": "mirrors the tree",
    "examples": "jobs that run in a minute or two on two CPU cores, with their data and models",
    "notebooks": "a first run, adapters and ranks, unlike clients, privacy; executed by a test",
    "benchmarks": "what is measured, one script a figure",
    "docs": "jobs.md: every key of a job; security.md; glossary.md; write.py keeps this page true",
}
OPENED = ("weft/core", "weft/site", "weft/links")  # a line for each file; of the others the names


def tree() -> str:
    """Return the tree of the repository, each comment the first sentence of the file's own docstring."""
    lines = ["```text", *_branch("weft")]
    for name in ("tests", "examples", "notebooks", "benchmarks", "docs"):
        lines += [_line(f"{name}/", FOLDERS[name])]
    return "\n".join([*lines, "```"])


def _branch(folder: str) -> Iterator[str]:
    yield f"{folder}/"
    here = ROOT / folder
    for path in sorted(here.glob("*.py")):
        if path.stem != "__init__":
            yield _line(f"├── {path.name}", _comment(path))
    inside = sorted(path for path in here.iterdir() if f"{folder}/{path.name}" in FOLDERS)
    for path in inside:
        last = path == inside[-1]
        yield _line(f"{'└──' if last else '├──'} {path.name}/", FOLDERS[f"{folder}/{path.name}"])
        yield from _leaves(path, " " if last else "│", f"{folder}/{path.name}" in OPENED)


def _leaves(folder: Path, bar: str, opened: bool) -> Iterator[str]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "__init__.py"]
    if opened:
        inside = sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file())
        for path in files:
            last = path == files[-1] and not inside
            yield _line(f"{bar}   {'└──' if last else '├──'} {path.name}", _comment(path))
        for path in inside:
            names = " ".join(file.name for file in sorted(path.glob("*.py")) if file.name != "__init__.py")
            yield _line(f"{bar}   {'└──' if path == inside[-1] else '├──'} {path.name}/", names)
        return
    row = f"{bar}   └──"
    for path in files:
        if len(row) + len(path.name) > WIDE:
            yield row
            row = f"{bar}      "
        row += f" {path.name}"
    yield row


def _line(name: str, comment: str) -> str:
    return f"{name:<{INDENT}} {comment}"


def _comment(path: Path) -> str:
    """Return a file's docstring, up to the last border of clauses that fits the line."""
    told = (ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or "").partition("\n")[0]
    told = told[:1].lower() + told[1:] if told[1:2].islower() or told[1:2] == " " else told
    told = told.rstrip(".:")
    for borders in ("[;:?.] |$", "[;:?,.] |$"):
        ends = [found.start() + (found[0] == "? ") for found in re.finditer(borders, told)]
        fitting = [told[:end] for end in ends if end <= WIDE - INDENT and _balanced(told[:end])]
        if fitting and len(fitting[-1]) > SHORT:
            return fitting[-1]
    return fitting[-1] if fitting else told


def _balanced(text: str) -> bool:
    return text.count("(") == text.count(")")


# --- the keys of a job

SECTIONS = {
    "": job.Job,
    "model": job.Model,
    "data": job.Data,
    "clients": job.Clients,
    "clients.devices.NAME": job.DeviceProfile,
    "local": job.Local,
    "local.dp": job.Dp,
    "privacy": job.Privacy,
    "failures": job.Failures,
    "evaluate": job.Evaluate,
    "sites.NAME": job.Member,
    "budget": job.Budget,
}
PLUGIN = "one {}, by name or as `{{name: {{key: value}}}}`"
MEANINGS = {  # of keys whose names say so much that the code says no more
    "model": "The frozen base model.",
    "adapter": "The PEFT method, see [Adapters](#adapters).",
    "task": "What is learned, see [Tasks](#tasks).",
    "data": "The records, and who has which.",
    "clients": "Who takes part in a round.",
    "local": "Training at a client.",
    "privacy": "How privacy is accounted for, see [Privacy](privacy.md).",
    "algorithm": "How the clients' updates become the next global adapter, see [Algorithms](#algorithms).",
    "pipeline": "What happens to an update between a client and the server, in order, see [Pipeline](#pipeline).",
    "budget": "What a run may spend.",
    "failures": "What happens when a client gives no update that can be counted.",
    "rounds": "Rounds of training.",
    "evaluate": "Evaluation on the test records.",
    "baselines": "Methods to compare with, trained on the same records with the same `local` keys, see "
    "[Baselines](#baselines).",
    "seed": "Decides every random draw: split, cohorts, batches, first adapter, dropout.",
    "model.revision": "Branch, tag or commit of a Hugging Face model.",
    "model.dtype": "Of the frozen base; adapters are trained, sent and summed in float32.",
    "data.train": "A file (relative to the job file), or a Hugging Face dataset, see [Data](#data).",
    "data.test": "Held-out records, read like `train`. A run needs them.",
    "data.split": "Who has which record, see [Splits](#splits).",
    "data.on_bad_record": "Stop at a record that cannot be used, or count it and leave it out.",
    "data.bad_record_cap": "With `skip`: the largest share of records that may be left out.",
    "local.optimizer": "AdamW as in PyTorch, or SGD.",
    "local.lr": "Peak learning rate.",
    "local.batch": "Examples of a micro-batch.",
    "local.epochs": "Passes over a client's records in a round.",
    "local.weight_decay": "Decoupled with `adamw`, added to the gradient with `sgd`, as in PyTorch.",
    "evaluate.max_new_tokens": "Longest answer that is generated.",
    "evaluate.batch": "Examples of a batch of the evaluation.",
}


def keys() -> str:
    """Return a table of keys for each section of a job."""
    parts = []
    for name, model in SECTIONS.items():
        said = _said(model.__name__)
        rows = [
            _row(f"{name}.{key}".lstrip("."), field, said.get(key, ""))
            for key, field in model.model_fields.items()
            if not field.exclude
        ]
        parts.append("\n".join([f"### {f'`{name}`' if name else 'The whole job'}", "", HEAD, *rows]))
    return "\n\n".join(parts)


HEAD = "| key | takes | default | meaning |\n|---|---|---|---|"


def _row(key: str, field: FieldInfo, said: str) -> str:
    meaning = said or MEANINGS.get(key, "")
    if not meaning:
        raise SystemExit(f"the key {key} has no meaning: give it a docstring in weft/job.py")
    takes = _takes(field.annotation) + _limits(field.metadata)
    if NoneType in get_args(field.annotation) and field.default is not None:
        takes += " or `null`"
    return f"| `{key}` | {takes} | {_default(key, field)} | {meaning} |".replace("||", "|")


def _default(key: str, field: FieldInfo) -> str:
    known = {"algorithm": "`fedavg`", "pipeline": "`[weigh]`", "clients.sampler": "`uniform`"}  # no plain defaults
    if key in known or field.is_required():
        return known.get(key, "required")
    if isinstance(field.annotation, type) and issubclass(field.annotation, job._Values):
        return "see below"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "none" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: ""}


def _takes(annotation: Any) -> str:
    """Say in words what a key takes."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation is plugins.Choice:
        return "a plug-in"
    if isinstance(annotation, type) and issubclass(annotation, job._Values):
        return "a section"
    if origin is Annotated:
        metadata = [row for part in inside[1:] for row in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _takes(inside[0]) + _limits(metadata)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(filter(None, map(_takes, inside)))
    if origin in (list, tuple):
        return f"list of {_takes(inside[0])}"
    if origin is dict:
        return f"mapping of {_takes(inside[0])} to {_takes(inside[1])}"
    return WORDS[annotation]


def _limits(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [(sign, getattr(row, name)) for row in metadata for name, sign in signs.items() if hasattr(row, name)]
    shown = [f"{sign} {'2^63' if value == 2**63 else value}" for sign, value in found]
    return f" {', '.join(shown)}" if shown else ""


def _said(name: str) -> dict[str, str]:
    """Return the docstrings that stand under the fields of a class of weft/job.py."""
    code = ast.parse(Path(str(job.__file__)).read_text(encoding="utf8"))
    body = next(node.body for node in code.body if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for field, text in pairwise(body):
        documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and documented:
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


# --- plug-ins


def plugins_of(kind: str) -> str:
    """Return a table of a kind's plug-ins, as `weft explain` tells them."""
    rows = ["| name | what it does | keys (default) |", "|---|---|---|"]
    for name in plugins.names(kind):
        parts = explain(name).split("\n\n")
        told = " ".join(parts[1].partition(": ")[2].split("\n")[0].split())
        listed = [line.split(": ", 1) for line in parts[-1].splitlines()[1:]]
        words = "; ".join(f"`{key.strip()}` {about}" for key, about in listed) or "none"
        rows.append(f"| `{name}` | {told} | {words} |")
    return "\n".join(rows)


KINDS = {
    "adapter": "adapters",
    "algorithm": "algorithms",
    "task": "tasks",
    "split": "splits",
    "transform": "pipeline",
    "sampler": "samplers",
    "pace": "asynchronous rounds",
}


def box() -> str:
    """Return the names of all plug-ins, a row for each kind."""
    rows = [
        f"| {told} | `{'`, `'.join(plugins.names(kind))}` | `weft/{plugins.FOLDERS[kind]}/` |"
        for kind, told in KINDS.items()
    ]
    return "\n".join(["| kind | names | folder |", "|---|---|---|", *rows])


# --- results

LABELS = {
    "untrained": "untrained base",
    "local": "local only (mean)",
    "centralized": "centralized",
    "federated": "**federated**",
}
COLUMNS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu4": "BLEU-4",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "text_at_1": "text R@1",
    "text_at_5": "text R@5",
    "image_at_1": "image R@1",
    "image_at_5": "image R@5",
}


def results(name: str) -> str:
    """Return a run's table as the command printed it, and what it took."""
    kept = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf8"))
    found = kept["results"]
    columns = list(found["methods"]["federated"]["overall"])
    lines = [f"| | {' | '.join(COLUMNS.get(column, column) for column in columns)} |", f"|---|{'---:|' * len(columns)}"]
    for method, label in LABELS.items():
        if method in found["methods"]:
            scores = found["methods"][method]["overall"]
            lines.append(f"| {label} | {' | '.join(_number(scores[column]) for column in columns)} |")
    return "\n".join([*lines, "", _took(found), *_overfitted(kept["curves"]), *_alone(kept["own"])])


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _took(found: dict[str, Any]) -> str:
    adapter, around = found["adapter"], found["environment"]
    sent = sum(found["bytes"].values()) / 1e6
    return (
        f"{found['clients']} clients, {found['rounds']} rounds; {adapter['trainable']:,} of {adapter['total']:,} "
        f"parameters trained; {sent:.1f} MB sent both ways. Measured on {around['threads']} CPU threads with torch "
        f"{around['torch']}, transformers {around['transformers']}, peft {around['peft']}."
    )


def _overfitted(curves: dict[str, list[float]]) -> Iterator[str]:
    """Say of each method whose test loss rose again by more than a hundredth where it was lowest."""
    for method, losses in curves.items():
        lowest = min(losses, default=0.0)
        if losses and losses[-1] > 1.01 * lowest:
            after = f"after round {losses.index(lowest)} of {len(losses) - 1}"
            yield f"The {method} model overfits: its test loss was lowest, {lowest:.4f}, {after}."


def _alone(own: list[int]) -> Iterator[str]:
    if own:
        yield (
            f"On their own test records, {own[0]} of {own[1]} clients do better with the federated adapter than with "
            "the one that they train alone."
        )


def _own(methods: dict[str, Any]) -> list[int]:
    """Return how many clients do better with the federated adapter on their own group, and how many there are."""
    alone, ours = methods.get("local", {}).get("own", {}), methods["federated"]["groups"]
    return [sum(ours[name]["loss"] < alone[name]["loss"] for name in alone), len(alone)] if alone else []


def _curves(run: Path) -> dict[str, list[float]]:
    """Return the test loss before the first round and after each, where every round was measured."""
    folders = {"federated": run} | {path.name: path for path in sorted(run.glob("baselines/*"))}
    rows = {name: journal.read(folder / "journal.jsonl") for name, folder in folders.items()}
    return {
        name: [row["evaluation"]["overall"]["loss"] for row in found]
        for name, found in rows.items()
        if all("evaluation" in row for row in found)
    }


def take_over(name: str, run: Path) -> None:
    """Keep a finished run's results, and the job that gave them, for the pages."""
    found = json.loads((run / "results.json").read_text(encoding="utf8"))
    resolved = yaml.safe_load((run / "job.yaml").read_text(encoding="utf8"))
    kept = {"job": resolved, "results": found, "curves": _curves(run), "own": _own(found["methods"])}
    for scores in found["methods"].values():
        for told in ("own", "clients", "groups"):
            scores.pop(told, None)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(kept, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf8")


# --- the pages


def part(name: str) -> str:
    """Return the text of a marked part, such as `tree` or `results medquad`."""
    if name.startswith("results "):
        return results(name.partition(" ")[2])
    if name.startswith("plug-ins "):
        return plugins_of(name.partition(" ")[2])
    return {"tree": tree, "keys": keys, "box": box}[name]()


def written(text: str) -> str:
    """Return a page with every marked part written anew."""
    marked = re.compile(r"(<!-- (?P<name>[a-z][\w -]*) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}\n{part(found['name'])}\n\n{found[3]}", text)


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    given = parser.parse_args()
    for named in given.runs:
        name, _, run = named.partition("=")
        take_over(name, Path(run))
    stale = [page for page in PAGES if written(page.read_text(encoding="utf8")) != page.read_text(encoding="utf8")]
    for page in stale:
        if given.check:
            print(f"{page.relative_to(ROOT)} is out of date: run `make docs`", file=sys.stderr)
        else:
            page.write_text(written(page.read_text(encoding="utf8")), encoding="utf8")
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
