"""Every mistake that a user can make gives one sentence: what, where, what to do; nothing is written.

One table. Each row damages one thing in a tiny sound job, runs the real command and looks at the exit code,
at standard error, and at every byte of the folder. `test_the_sound_job_passes` is the control: undamaged, the
same job runs.
"""

import gzip
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from weft import cli
from weft.core.errors import JobError

TOKENIZER = Path(__file__).parent.parent / "examples" / "models" / "stories260K"
SECRET = "Zanzibar"  # stands in every record and in no error

JOB = """\
model: {name: model}
adapter: {lora: {rank: 2, targets: [q_proj]}}
task: {causal_lm: {template: plain, max_length: 48}}
data:
  train: train.jsonl
  test: test.jsonl
  split: {by: site}
local: {lr: 1e-3, batch: 2}
rounds: 1
evaluate: {every: 0, on: [loss]}
baselines: [untrained]
seed: 7
"""

Change = Callable[[Path], object]


# --- the sound world


def record(i: int) -> dict[str, Any]:
    site = ("north", "south", "west")[i % 3]
    return {"question": f"Is {SECRET} far, number {i}?", "answer": f"{SECRET} is.", "site": site}


def labelled(i: int) -> dict[str, Any]:
    return {"text": f"{SECRET}, number {i}", "label": f"L{i % 2}", "site": ("north", "south", "west")[i % 3]}


def lines(*records: Any) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in records)


def save_model(folder: Path, kind: str, **changes: Any) -> None:
    """Write a model of random weights, of a few thousand parameters."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config_kind, net_kind = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "llama body": (transformers.LlamaConfig, transformers.LlamaModel),
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
    }[kind]
    sizes = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = config_kind(**sizes | {"num_attention_heads": 2, "max_position_embeddings": 64} | changes)
    torch.manual_seed(0)
    net_kind(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "model", "llama")
    save_model(folder / "body", "llama body")
    save_model(folder / "encoder", "bert")
    save_model(folder / "small", "llama", vocab_size=300)
    return folder


@pytest.fixture
def world(models: Path) -> Iterator[Path]:
    """Yield a folder with a sound job, its data and its model, open to every user of the machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "job.yaml").write_text(JOB)
        (folder / "train.jsonl").write_text(lines(*map(record, range(12))))
        (folder / "test.jsonl").write_text(lines(*map(record, range(12, 18))))
        shutil.copytree(models / "model", folder / "model")
        yield folder


@pytest.fixture(scope="session")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the job has run once, into runs/job."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "job.yaml").write_text(JOB)
    (folder / "train.jsonl").write_text(lines(*map(record, range(12))))
    (folder / "test.jsonl").write_text(lines(*map(record, range(12, 18))))
    shutil.copytree(models / "model", folder / "model")
    import weft

    weft.run(folder / "job.yaml", folder / "runs" / "job")
    return folder


# --- what can be damaged


def put(name: str, content: str | bytes) -> Change:
    def change(world: Path) -> None:
        path = world / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def edit(old: str, new: str) -> Change:
    """Replace text in the job, which must be there."""

    def change(world: Path) -> None:
        text = (world / "job.yaml").read_text()
        assert old in text
        (world / "job.yaml").write_text(text.replace(old, new, 1))

    return change


def third(line: Any, name: str = "train.jsonl") -> Change:
    """Put a bad record on line 3 of a file."""

    def change(world: Path) -> None:
        good = (world / name).read_bytes().splitlines(keepends=True)
        raw = line if isinstance(line, bytes) else lines(line).encode()
        (world / name).write_bytes(b"".join([*good[:2], raw.rstrip(b"\n") + b"\n", *good[2:]]))

    return change


def source(name: str, content: str | bytes) -> Change:
    """Train on another file."""
    return both(edit("train.jsonl", name), put(name, content))


def both(*changes: Change) -> Change:
    def change(world: Path) -> None:
        for one in changes:
            one(world)

    return change


def without(*names: str) -> Change:
    def change(world: Path) -> None:
        for name in names:
            path = world / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def config(**changes: Any) -> Change:
    def change(world: Path) -> None:
        path = world / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def model(name: str) -> Change:
    """Take another of the session's models; the world fixture's neighbour `models` has it."""

    def change(world: Path) -> None:
        shutil.rmtree(world / "model")
        shutil.copytree(MODELS[0] / name, world / "model")

    return change


MODELS: list[Path] = []  # set by the fixture below: a row of a table has no fixtures


@pytest.fixture(autouse=True)
def _models(models: Path) -> None:
    MODELS[:] = [models]


def cut(name: str, part: float) -> Change:
    def change(world: Path) -> None:
        whole = (world / name).read_bytes()
        (world / name).write_bytes(whole[: int(len(whole) * part)])

    return change


def mode(name: str, bits: int) -> Change:
    return lambda world: (world / name).chmod(bits)


def folder(name: str) -> Change:
    return lambda world: (world / name).mkdir(parents=True)


def damage_checkpoints(world: Path) -> None:
    for path in (world / "runs" / "job" / "checkpoints").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")


def reseal(**changes: str) -> Change:
    """Give every checkpoint other facts and a checksum that holds."""

    def change(world: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        from weft.store import _digest

        for path in (world / "runs" / "job" / "checkpoints").glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                meta = {key: value for key, value in file.metadata().items() if key != "sha256"} | changes
                flat = {name: file.get_tensor(name) for name in sorted(file.keys())}
            save_file(flat, path, {**meta, "sha256": _digest(flat, meta)})

    return change


def ask_of_a_classifier(world: Path) -> None:
    path = world / "runs" / "job" / "job.yaml"
    text = path.read_text().replace("causal_lm:\n    template: plain\n", "classification:\n")
    path.write_text(text.replace("    language: en\n", ""))


def nothing(world: Path) -> None:
    pass


CLASSIFY = both(
    edit("causal_lm: {template: plain, max_length: 48}", "classification: {max_length: 16}"),
    put("train.jsonl", lines(*map(labelled, range(12)))),
    put("test.jsonl", lines(*map(labelled, range(12, 18)))),
)
SPLIT = "split: {by: site}"
DEEP = "[" * 50_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in ("ab", "bc", "cd", "de")
)


@dataclass(frozen=True)
class Bad:
    """A mistake: what is changed, which command is run, and what the one sentence must say."""

    what: str
    says: tuple[str, ...]
    change: Change = nothing
    command: str = "run job.yaml"
    code: int = 2
    after_a_run: bool = False
    as_nobody: bool = False
    """Run without the rights of root, who may read and write everything."""


COMMAND_LINE = [
    Bad("unknown command", ("No such command 'rnu'. Did you mean 'run'? (try `weft --help`)",), command="rnu job.yaml"),
    Bad("unknown option", ("--overwrit", "weft run --help"), command="run job.yaml --overwrit"),
    Bad("no job", ("Missing argument 'JOB'", "weft run --help"), command="run"),
    Bad("an argument too many", ("unexpected extra argument", "more.yaml"), command="run job.yaml more.yaml"),
    Bad("option without its value", ("--set", "requires an argument"), command="run job.yaml --set"),
    Bad("ask for no tokens", ("--tokens", "1", "weft ask --help"), command="ask runs/job Why? --tokens 0"),
    Bad("the job is a folder", ("model is a folder", "name the job file in it"), command="run model"),
    Bad("no such job", ("no job file jbo.yaml", "did you mean `job.yaml`"), command="run jbo.yaml"),
    Bad("no such folder", ("no job file no/where.yaml",), command="check no/where.yaml"),
    Bad("a name too long", ("cannot be read", "File name too long"), command=f"run {'x' * 300}.yaml"),
    Bad("unreadable job", ("job.yaml", "cannot be read", "permissions"), mode("job.yaml", 0), as_nobody=True),
    Bad("--set without =", ("--set local.lr", "write key=value"), command="run job.yaml --set local.lr"),
    Bad("--set without a key", ("--set =3", "write key=value"), command="run job.yaml --set =3"),
    Bad("--set of no YAML", ("--set rounds=[1", "not YAML"), command="run job.yaml --set rounds=[1"),
    Bad(
        "--set of an unknown key",
        ("--set local.learning_rate", "unknown key", "known: accumulate"),
        command="run job.yaml --set local.learning_rate=1",
    ),
    Bad(
        "--set of a wrong type",
        ("--set rounds", "whole number", "'ten'"),
        command="run job.yaml --set rounds=ten",
    ),
    Bad("--set below a number", ("`rounds` holds no keys",), command="run job.yaml --set rounds.x=1"),
    Bad(
        "--resume and --overwrite",
        ("--resume", "--overwrite", "give one"),
        command="run job.yaml --resume --overwrite",
    ),
    Bad(
        "resume without a run",
        ("runs/job", "no run to resume", "leave out --resume"),
        command="run job.yaml --resume",
    ),
    Bad("out is a file", ("--out seen", "is a file"), put("seen", "x"), "run job.yaml --out seen"),
    Bad("out below a file", ("--out seen/a", "seen is a file"), put("seen", "x"), "run job.yaml --out seen/a"),
    Bad(
        "out is something else",
        ("--out mine", "not empty and not a run", "choose another"),
        put("mine/notes.txt", "x"),
        "run job.yaml --out mine",
    ),
    Bad(
        "overwrite something else",
        ("--out mine", "not a run", "choose another"),
        put("mine/notes.txt", "x"),
        "run job.yaml --out mine --overwrite",
    ),
    Bad(
        "out cannot be written to",
        ("--out shut/a", "shut cannot be written to", "permissions"),
        both(folder("shut"), mode("shut", 0o555)),
        "run job.yaml --out shut/a",
        as_nobody=True,
    ),
    Bad("explain nothing known", ("no plug-in `lroa`", "did you mean `lora`"), command="explain lroa"),
    Bad("explain no module", ("no_such.module:f", "cannot be imported"), command="explain no_such.module:f"),
    Bad("ask nothing", ("nowhere is not a run folder", "run.json"), command="ask nowhere Why?"),
    Bad("report nothing", ("nowhere is not a run folder", "run.json"), command="report nowhere"),
    Bad("export nothing", ("nowhere is not a run folder",), command="export nowhere --to there"),
]

YAML = [
    Bad("empty", ("job.yaml", "a job is a mapping"), put("job.yaml", "")),
    Bad("only a comment", ("job.yaml", "a job is a mapping"), put("job.yaml", "# nothing\n")),
    Bad("a list", ("job.yaml", "a job is a mapping"), put("job.yaml", "- model\n- adapter\n")),
    Bad("not UTF-8", ("job.yaml, line 13", "UTF-8"), lambda w: put("job.yaml", JOB.encode() + b"# \xe9")(w)),
    Bad("a binary file", ("job.yaml, line 1", "cannot be printed"), put("job.yaml", b"a\0b: 1")),
    Bad("a huge file", ("job.yaml", "at most 1,000,000 bytes"), put("job.yaml", b"# x\n" * 300_000)),
    Bad(
        "a key twice",
        ("job.yaml, line 13", "`rounds`", "first on line 9"),
        edit("seed: 7", "seed: 7\nrounds: 2"),
    ),
    Bad(
        "a nested key twice",
        ("job.yaml, line 8", "`lr` stands here a second time"),
        edit("batch: 2", "batch: 2, lr: 2"),
    ),
    Bad("a tab", ("job.yaml, line 5", "not YAML", "spaces, not tabs"), edit("  train:", "\ttrain:")),
    Bad("a bracket left open", ("job.yaml, line 10", "not YAML"), edit("1e-3, batch: 2}", "1e-3, batch: 2\n")),
    Bad("a Python tag", ("job.yaml, line 12", "python/name", "not allowed"), edit("7", "!!python/name:os.system")),
    Bad("a tag", ("job.yaml, line 12", "tag:yaml.org,2002:int", "plainly"), edit("7", "!!int 7")),
    Bad("two documents", ("job.yaml, line 13", "single document"), edit("seed: 7", "seed: 7\n---\nseed: 8")),
    Bad("an alias of nothing", ("job.yaml, line 12", "undefined alias"), edit("7", "*seven")),
    Bad("anchors that explode", ("job.yaml", "too many or too deeply"), put("job.yaml", BOMB)),
    Bad("an anchor in itself", ("job.yaml", "too deeply nested"), put("job.yaml", "a: &a [*a]\n")),
    Bad("deep nesting", ("job.yaml", "too deeply nested"), put("job.yaml", f"a: {DEEP}")),
    Bad("a list as a key", ("job.yaml, line 12", "a key must be a word"), edit("seed: 7", "? [seed]\n: 7")),
]

KEYS = [
    Bad("unknown key", ("job.yaml, line 9", "round: unknown key", "did you mean `rounds`"), edit("rounds", "round")),
    Bad(
        "unknown nested key",
        ("job.yaml, line 8", "local.learn", "unknown key"),
        edit("lr: 1e-3", "learn: 1e-3"),
    ),
    Bad("a key of Weft's own", ("job.yaml, line 12", "folder: unknown key"), edit("seed: 7", "folder: /")),
    Bad("a key of Python's", ("job.yaml, line 12", "self: unknown key"), edit("seed: 7", "self: 7")),
    Bad("no model", ("job.yaml", "model: is missing"), edit("model: {name: model}\n", "")),
    Bad("no adapter", ("job.yaml", "adapter: is missing"), edit("adapter:", "# adapter:")),
    Bad("no split", ("job.yaml, line 4", "data.split: is missing"), edit(f"  {SPLIT}\n", "")),
    Bad("no test", ("job.yaml, line 4", "data.test: is missing"), edit("  test: test.jsonl\n", "")),
    Bad("text for a number", ("job.yaml, line 8", "local.lr: must be a number", "'fast'"), edit("1e-3", "fast")),
    Bad("quoted number", ("line 8", "local.lr: must be a number", "'1e-3'"), edit("1e-3", "'1e-3'")),
    Bad("NaN", ("line 8", "local.lr: must be a finite number", "nan"), edit("1e-3", ".nan")),
    Bad("infinite", ("line 8", "local.lr: must be a finite number", "inf"), edit("1e-3", ".inf")),
    Bad("too large for a float", ("line 8", "local.lr", "finite", "inf"), edit("1e-3", "1e999")),
    Bad("lr of zero", ("line 8", "local.lr: must be more than 0", "0.0"), edit("1e-3", "0.0")),
    Bad("zero rounds", ("line 9", "rounds: must be more than 0"), edit("rounds: 1", "rounds: 0")),
    Bad("negative rounds", ("line 9", "rounds: must be more than 0", "-3"), edit("rounds: 1", "rounds: -3")),
    Bad("half a round", ("line 9", "rounds: must be a whole number", "1.5"), edit("rounds: 1", "rounds: 1.5")),
    Bad("a float as a count", ("line 9", "whole number", "2.0"), edit("rounds: 1", "rounds: 2.0")),
    Bad("true as a count", ("line 9", "whole number", "true"), edit("rounds: 1", "rounds: true")),
    Bad("no value", ("line 9", "whole number", "null"), edit("rounds: 1", "rounds:")),
    Bad("a date", ("line 9", "whole number", "'2024-01-01'"), edit("rounds: 1", "rounds: 2024-01-01")),
    Bad("a number of 5000 digits", ("line 9", "rounds"), edit("rounds: 1", f"rounds: {'9' * 5000}")),
    Bad("batch of zero", ("line 8", "local.batch: must be more than 0"), edit("batch: 2", "batch: 0")),
    Bad("yes", ("line 8", "local.checkpointing: must be true or false", "'yes'"), edit("2}", "2, checkpointing: yes}")),
    Bad(
        "on", ("line 1", "model.random: must be true or false", "'on'"), edit("name: model", "name: model, random: on")
    ),
    Bad(
        "one as true", ("line 1", "model.random: must be true or false"), edit("name: model", "name: model, random: 1")
    ),
    Bad("a list for a mapping", ("line 8", "local: must be a mapping"), edit("{lr: 1e-3, batch: 2}", "[1e-3]")),
    Bad("a word for a mapping", ("line 1", "model: must be a mapping", "'model'"), edit("{name: model}", "model")),
    Bad("a word for a list", ("line 10", "evaluate.on: must be a list"), edit("[loss]", "loss")),
    Bad("unknown optimizer", ("line 8", "local.optimizer", "'sgd'", "'adam'"), edit("2}", "2, optimizer: adam}")),
    Bad("unknown dtype", ("line 1", "model.dtype", "'bfloat16'", "'bf16'"), edit("model}", "model, dtype: bf16}")),
    Bad("unknown baseline", ("line 11", "baselines[0]", "'centralized'"), edit("[untrained]", "[central]")),
    Bad("epochs and steps", ("line 8", "local", "epochs or steps, not both"), edit("2}", "2, epochs: 2, steps: 3}")),
    Bad("momentum with adamw", ("line 8", "local", "momentum is a key of sgd"), edit("2}", "2, momentum: 0.9}")),
    Bad("negative seed", ("line 12", "seed: must be at least 0", "-1"), edit("seed: 7", "seed: -1")),
    Bad("seed too big", ("line 12", "seed: must be less than"), edit("seed: 7", f"seed: {2**64}")),
    Bad("unknown metric", ("line 10", "no metric `bluue`", "did you mean `bleu`"), edit("[loss]", "[bluue]")),
    Bad(
        "more clients than there are",
        ("line 13", "clients.per_round", "4 is more than the 3 clients"),
        edit("seed: 7", "seed: 7\nclients: {per_round: 4}"),
    ),
]

PLUGINS = [
    Bad("unknown adapter", ("line 2", "no adapter `lroa`", "did you mean `lora`"), edit("lora", "lroa")),
    Bad("unknown split", ("line 7", "data.split", "no split `bye`"), edit("{by: site}", "bye")),
    Bad(
        "unknown transform", ("pipeline[0]", "no transform `weight`", "`weigh`"), edit("seed: 7", "pipeline: [weight]")
    ),
    Bad("unknown key of a plug-in", ("line 2", "adapter.lora.rnak", "`rank`"), edit("rank", "rnak")),
    Bad("no keys taken", ("algorithm", "`fedavg` takes no keys"), edit("seed: 7", "algorithm: {fedavg: 3}")),
    Bad("two plug-ins", ("line 2", "name one adapter"), edit("[q_proj]}}", "[q_proj]}, ia3: {}}")),
    Bad("no plug-in", ("line 2", "name one adapter"), edit("{lora: {rank: 2, targets: [q_proj]}}", "{}")),
    Bad("rank of zero", ("line 2", "adapter.lora.rank: must be more than 0"), edit("rank: 2", "rank: 0")),
    Bad("text as a rank", ("line 2", "adapter.lora.rank: must be a whole number"), edit("rank: 2", "rank: two")),
    Bad("rank above a side", ("line 2", "rank: 17 is more than a side", "q_proj (16)"), edit("rank: 2", "rank: 17")),
    Bad("dropout of one", ("line 2", "adapter.lora.dropout: must be less than 1"), edit("rank: 2", "dropout: 1.0")),
    Bad("targets of nothing", ("line 2", "['query'] match no layer", "q_proj"), edit("[q_proj]", "[query]")),
    Bad("one target of nothing", ("line 2", "['query'] match no layer"), edit("[q_proj]", "[q_proj, query]")),
    Bad("no target", ("line 2", "[] match no layer"), edit("[q_proj]", "[]")),
    Bad("a target that cannot be adapted", ("line 2", "targets", "not supported"), edit("[q_proj]", "[norm]")),
    Bad("a regular expression", ("line 2", "targets[0]", "must have the form"), edit("[q_proj]", "['.*proj']")),
    Bad(
        "a word as targets", ("line 2", "targets: must be 'auto' or 'all-linear' or a list"), edit("[q_proj]", "q_proj")
    ),
    Bad("a split without its key", ("line 7", "split.by.column: is missing"), edit("{by: site}", "by")),
    Bad("too long for the model", ("line 3", "max_length", "65 is more than the model's 64"), edit("48", "65")),
    Bad("no weigh", ("pipeline", "weigh: {by: examples}"), edit("seed: 7", "pipeline: []")),
    Bad("two weighs", ("pipeline", "second weigh"), edit("seed: 7", "pipeline: [weigh, weigh]")),
    Bad("a pipeline that is no list", ("line 12", "pipeline: must be a list"), edit("seed: 7", "pipeline: weigh")),
    Bad("a chat without a template", ("line 3", "chat needs a chat template"), edit("plain", "chat")),
    Bad("a template without a column", ("line 3", "template", "{column}"), edit("plain", "ask")),
    Bad("a template of no column", ("line 3", "no column `topic`"), edit("plain", "'Q: {topic}'")),
    Bad("a template left open", ("line 3", "template", "brace"), edit("plain", "'Q: {question'")),
    Bad("your own, not installed", ("line 2", "no_such.lora:f", "PYTHONPATH"), edit("lora:", "'no_such.lora:f':")),
    Bad("your own, no function", ("line 2", "os.path", "no function `lora`"), edit("lora:", "'os.path:lora':")),
    Bad("your own, no plug-in", ("line 2", "`join`", "keys must be named"), edit("lora:", "'os.path:join':")),
    Bad(
        "your own, of another kind",
        ("line 2", "is no adapter: it returns str"),
        edit("lora: {rank: 2, targets: [q_proj]}", "'os.path:basename': {p: x}"),
    ),
    Bad("your own, from a script", ("os:system", "adapter"), edit("lora:", "'os:system':")),
]

DATA = [
    Bad("no training file", ("trian.jsonl", "Did you mean train.jsonl"), edit("train.jsonl", "trian.jsonl")),
    Bad(
        "no folder of records",
        ("there/train.jsonl", "folder", "does not exist"),
        edit("train.jsonl", "there/train.jsonl"),
    ),
    Bad("no test file", ("text.jsonl", "Did you mean test.jsonl"), edit("test.jsonl", "text.jsonl")),
    Bad("records are a folder", ("model", "is a folder"), edit("train.jsonl", "model")),
    Bad("a format that is not read", ("train.tsv", ".jsonl", "Convert"), source("train.tsv", "a\tb\n")),
    Bad("empty file", ("train.jsonl", "empty file"), put("train.jsonl", "")),
    Bad("only empty lines", ("train.jsonl", "holds no record"), put("train.jsonl", "\n\n")),
    Bad(
        "Git LFS pointer",
        ("train.jsonl", "git lfs pull"),
        put("train.jsonl", "version https://git-lfs.github.com/spec/v1\n"),
    ),
    Bad("gzip by another name", ("train.jsonl", "gzip", "Rename"), put("train.jsonl", gzip.compress(b"{}"))),
    Bad("half a gzip", ("part.jsonl.gz", "not a whole gzip"), source("part.jsonl.gz", gzip.compress(b"{}" * 999)[:-9])),
    Bad("UTF-16", ("train.jsonl", "UTF-16", "UTF-8"), put("train.jsonl", "{}".encode("utf-16"))),
    Bad("Latin-1", ("train.jsonl:3", "not valid UTF-8"), third(f'{{"question": "{SECRET} é"}}'.encode("latin-1"))),
    Bad("NUL", ("train.jsonl:3", "NUL"), third(f"{SECRET}\0".encode())),
    Bad("half a line", ("train.jsonl:3", "not JSON"), third(json.dumps(record(1))[:-9] + "\n")),
    Bad("a list as a record", ("train.jsonl:3", "a list"), third(f'["{SECRET}"]\n')),
    Bad(
        "a record with a key twice",
        ("train.jsonl:3", "twice"),
        third(f'{{"question": "{SECRET}", "question": "{SECRET}"}}\n'),
    ),
    Bad("a record with NaN", ("train.jsonl:3", "NaN"), third(f'{{"question": "{SECRET}", "answer": NaN}}\n')),
    Bad("a number too large", ("train.jsonl:3", "too large"), third(f'{{"question": "{SECRET}", "answer": 1e999}}\n')),
    Bad("a record nested deep", ("train.jsonl:3", "nested too deep"), third('{"a":' * 100_000 + "\n")),
    Bad("half a surrogate", ("train.jsonl:3", "UTF-8"), third('{"question": "\\ud800", "answer": "a"}\n')),
    Bad("no answer", ("train.jsonl:3", "'answer' is missing"), third({"question": SECRET, "site": "north"})),
    Bad("null as an answer", ("train.jsonl:3", "'answer' is null"), third(record(1) | {"answer": None})),
    Bad("a blank answer", ("train.jsonl:3", "'answer' is empty"), third(record(1) | {"answer": " "})),
    Bad("a number for text", ("train.jsonl:3", "a number"), third(record(1) | {"answer": 3})),
    Bad("a bad test record", ("test.jsonl:3", "'answer' is null"), third(record(1) | {"answer": None}, "test.jsonl")),
    Bad(
        "too many to skip",
        ("train.jsonl", "1 of 13", "bad_record_cap"),
        both(third({"question": SECRET}), edit("data:", "data:\n  on_bad_record: skip")),
    ),
    Bad(
        "other columns",
        ("other.jsonl", "question with answer", "data.columns"),
        source("other.jsonl", lines({"q": SECRET})),
    ),
    Bad(
        "columns of nothing", ("train.jsonl", "'q'", "Columns found"), edit("data:", "data:\n  columns: {question: q}")
    ),
    Bad(
        "a message without a role",
        ("chat.jsonl:1", "role"),
        source("chat.jsonl", lines({"messages": [{"content": SECRET}]})),
    ),
    Bad(
        "a dialogue without an answer",
        ("chat.jsonl:1", "no answer"),
        source("chat.jsonl", lines({"messages": [{"role": "user", "content": SECRET}]})),
    ),
    Bad("a CSV with a quote left open", ("train.csv:2", "CSV"), source("train.csv", f'question,answer\n"{SECRET},b\n')),
    Bad("a CSV with a short row", ("train.csv:2", "1 cells"), source("train.csv", f"question,answer\n{SECRET}\n")),
    Bad(
        "a CSV header twice", ("train.csv:1", "repeated name"), source("train.csv", f"question,question\n{SECRET},a\n")
    ),
    Bad("an object for a list", ("train.json", "an object"), source("train.json", json.dumps(record(1)))),
    Bad("not Parquet", ("train.parquet", "not a whole Parquet"), source("train.parquet", SECRET)),
    Bad("no column to split by", ("line 7", "data.split.by", "'clinic'", "Columns found"), edit("site}", "clinic}")),
    Bad("more clients than records", ("line 7", "data.split", "none of the 12 records"), edit("by: site", "iid: 13")),
    Bad(
        "more topics than records",
        ("line 7", "no 99 topics"),
        edit("by: site", "topic: {alpha: 1.0, clients: 2, topics: 99}"),
    ),
    Bad("more than a share", ("line 7", "data.split"), edit("by: site", "quantity: {clients: 9, minimum: 2}")),
    Bad("alpha of zero", ("line 7", "dirichlet.alpha"), edit("by: site", "dirichlet: {alpha: 0.0, clients: 2}")),
    Bad("one label", ("train", "two labels"), both(CLASSIFY, put("train.jsonl", lines(labelled(0), labelled(2))))),
    Bad(
        "an unknown label in the test",
        ("test.jsonl, record 3", "label that no training record has"),
        both(CLASSIFY, third(labelled(1) | {"label": SECRET}, "test.jsonl")),
    ),
    Bad("no label", ("train.jsonl:3", "'label' is null"), both(CLASSIFY, third(labelled(1) | {"label": None}))),
    Bad(
        "unreadable data",
        ("train.jsonl", "cannot be read", "permissions"),
        both(mode(".", 0o777), mode("train.jsonl", 0)),
        as_nobody=True,
    ),
]

MODEL_FOLDERS = [
    Bad("no model folder", ("line 1", "no folder ./modle"), edit("name: model", "name: ./modle")),
    Bad(
        "no model folder beside others",
        ("line 1", "did you mean `tiny`"),
        both(folder("my/tiny"), edit("name: model", "name: my/tinny")),
    ),
    Bad("the model is a file", ("line 1", "is a file", "name the folder"), edit("name: model", "name: train.jsonl")),
    Bad("no config.json", ("line 1", "no config.json"), without("model/config.json")),
    Bad("no tokenizer", ("line 1", "no tokenizer", "tokenizer.json"), without("model/tokenizer.json")),
    Bad("no weights", ("line 1", "no weights", "safetensors"), without("model/model.safetensors")),
    Bad(
        "pickled weights",
        ("line 1", "(.bin)", "convert"),
        lambda w: (w / "model/model.safetensors").rename(w / "model/pytorch_model.bin"),
    ),
    Bad("damaged config.json", ("line 1", "config.json", "not a JSON object"), cut("model/config.json", 0.5)),
    Bad("config.json is a list", ("line 1", "config.json", "not a JSON object"), put("model/config.json", "[]")),
    Bad("unknown kind of model", ("line 1", "lama3000"), config(model_type="lama3000")),
    Bad(
        "sizes that do not fit",
        ("line 1", "config.json of model cannot be used", "hidden size (16)"),
        config(num_attention_heads=3),
    ),
    Bad("damaged tokenizer", ("line 1", "tokenizer of model cannot be read"), cut("model/tokenizer.json", 0.5)),
    Bad("weights cut short", ("line 1", "model"), cut("model/model.safetensors", 0.5)),
    Bad("weights that are none", ("line 1", "model"), put("model/model.safetensors", b"\0" * 64)),
    Bad("weights with a huge header", ("line 1", "model"), put("model/model.safetensors", struct.pack("<Q", 2**62))),
    Bad(
        "weights of other shapes",
        ("line 1", "(16, 32)", "(16, 64)", "do not belong together"),
        config(intermediate_size=64),
    ),
    Bad("weights that are missing", ("line 1", "lack", "model.layers.1"), config(num_hidden_layers=2)),
    Bad("a model without its head", ("line 1", "lack 1 tensors", "lm_head.weight"), model("body")),
    Bad("missing under a new head", ("line 1", "lack", "model.layers.1"), both(CLASSIFY, config(num_hidden_layers=2))),
    Bad("an encoder for text", ("line 1", "is an encoder", "decoder"), both(model("encoder"), edit("q_proj", "query"))),
    Bad("tokenizer too large", ("line 1", "512 tokens", "only 300", "do not belong together"), model("small")),
]

RUN_FOLDERS = [
    Bad("ask nothing at all", ("question is empty", "weft ask"), command="ask runs/job ' '"),
    Bad("ask, no answers", ("classification", "labels, not answers"), ask_of_a_classifier, "ask runs/job Why?"),
    Bad("a run is there", ("runs/job already holds a run", "--resume", "--out"), code=3),
    Bad(
        "resume with a changed job",
        ("runs/job holds a run of another job", "changed: local.lr, rounds", "--out"),
        edit("1e-3, batch: 2}\nrounds: 1", "1e-2, batch: 2}\nrounds: 3"),
        "run job.yaml --resume",
        code=3,
    ),
    Bad("overwrite by a bad job", ("train.jsonl", "empty"), put("train.jsonl", ""), "run job.yaml --overwrite"),
    Bad("ask, no job.yaml", ("runs/job", "job.yaml"), without("runs/job/job.yaml"), "ask runs/job Why?"),
    Bad("ask, damaged run.json", ("runs/job/run.json", "damaged"), put("runs/job/run.json", "{"), "ask runs/job Why?"),
    Bad("resume, damaged run.json", ("run.json", "damaged"), put("runs/job/run.json", "{"), "run job.yaml --resume"),
    Bad(
        "ask, no adapter",
        ("runs/job holds no adapter yet", "--resume"),
        without("runs/job/adapter"),
        "ask runs/job Why?",
    ),
    Bad(
        "ask, damaged adapter",
        ("adapter_model.safetensors", "damaged"),
        cut("runs/job/adapter/adapter_model.safetensors", 0.5),
        "ask runs/job Why?",
    ),
    Bad("export into a folder", ("--to model", "exists already"), command="export runs/job --to model"),
    Bad("export into nowhere", ("--to no/there", "no folder no"), command="export runs/job --to no/there"),
    Bad("export, no adapter", ("holds no adapter yet",), without("runs/job/adapter"), "export runs/job --to there"),
    Bad(
        "merge, no results",
        ("no results.json",),
        without("runs/job/results.json"),
        "export runs/job --to there --merge",
    ),
    Bad("report, damaged results", ("results.json", "damaged"), put("runs/job/results.json", "{"), "report runs/job"),
    Bad(
        "all checkpoints damaged",
        ("no checkpoint", "whole", "another folder"),
        damage_checkpoints,
        "run job.yaml --resume",
        code=1,
    ),
    Bad(
        "checkpoint of another job", ("belongs to another job",), reseal(job="0" * 64), "run job.yaml --resume", code=3
    ),
    Bad(
        "checkpoint of another format",
        ("another version of Weft", "format 0"),
        reseal(format="0"),
        "run job.yaml --resume",
        code=3,
    ),
]
RUN_FOLDERS = [Bad(**{**vars(bad), "after_a_run": True}) for bad in RUN_FOLDERS]

ALL = [*COMMAND_LINE, *YAML, *KEYS, *PLUGINS, *DATA, *MODEL_FOLDERS, *RUN_FOLDERS]


# --- running a command


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every file's bytes by its path, and None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", *arguments])
    try:
        cli.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def check_sentence(errors: str, says: tuple[str, ...]) -> None:
    found = errors.strip().splitlines()
    assert len(found) == 1, errors
    assert found[0].startswith("error: ")
    assert "Traceback" not in errors
    assert "defect of Weft" not in errors
    assert SECRET not in errors
    assert [words for words in says if words not in errors] == [], errors


@contextmanager
def rights_of(bad: Bad) -> Iterator[None]:
    """Drop root's rights for a while where a row asks for it: root may read and write everything."""
    drop = bad.as_nobody and os.geteuid() == 0
    if drop:
        os.seteuid(65534)
    try:
        yield
    finally:
        if drop:
            os.seteuid(0)


def names(rows: list[Bad]) -> list[str]:
    return [bad.what for bad in rows]


def put_run(finished: Path, world: Path) -> None:
    """Copy a finished run, as if it had run here."""
    shutil.copytree(finished / "runs", world / "runs")
    start = world / "runs" / "job" / "run.json"
    start.write_text(start.read_text().replace(str(finished.resolve()), str(world.resolve())))


@pytest.mark.parametrize("bad", ALL, ids=names(ALL))
def test_a_mistake_gives_one_sentence_and_changes_nothing(
    bad: Bad,
    world: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    if bad.after_a_run:
        put_run(request.getfixturevalue("finished"), world)
    bad.change(world)
    before = snapshot(world)
    monkeypatch.chdir(world)
    capfd.readouterr()
    with rights_of(bad):
        code = call(shlex.split(bad.command), monkeypatch)
    out, errors = capfd.readouterr()
    record_property("said", errors)
    record_property("code", code)
    check_sentence(errors, bad.says)
    assert code == bad.code
    assert out == ""
    assert snapshot(world) == before


def test_the_table_is_long_and_names_each_mistake_once() -> None:
    assert len(ALL) >= 75
    assert len(set(names(ALL))) == len(ALL)


# --- the same through a real process, where nothing of this one is imported yet

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
PROCESSES = [
    next(bad for bad in ALL if bad.what == what)
    for what in ("unknown command", "a key twice", "half a line", "weights of other shapes")
] + [
    Bad("no such model", ("line 1", "nobody/has-this"), edit("name: model", "name: nobody/has-this")),
    Bad("no such dataset", ("nobody/has-this", "hub"), edit("train.jsonl", "nobody/has-this")),
]


@pytest.mark.parametrize("bad", PROCESSES, ids=names(PROCESSES))
def test_a_mistake_gives_one_sentence_in_a_process_of_its_own(bad: Bad, world: Path) -> None:
    bad.change(world)
    before = snapshot(world)
    command = [sys.executable, "-m", "weft.cli", *shlex.split(bad.command)]
    done = subprocess.run(command, cwd=world, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=120)
    check_sentence(done.stderr, bad.says)
    assert (done.returncode, done.stdout) == (bad.code, "")
    assert snapshot(world) == before


# --- controls: what is no mistake passes


SOUND = {
    "as it is": "",
    "1e-4 is a number": "--set local.lr=1e-4",
    "a whole number as a float": "--set local.lr=1",
    "all layers": "--set adapter=lora",
    "the largest seed": f"--set seed={2**63 - 1}",
    "the largest rank": "--set adapter.lora.rank=16",
    "the whole length": "--set task.causal_lm.max_length=64",
}


@pytest.mark.parametrize("options", SOUND.values(), ids=SOUND)
def test_a_sound_job_passes(options: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    assert call(["check", "job.yaml", *options.split()], monkeypatch) == 0
    assert not (world / "runs").exists()


def test_a_job_that_windows_wrote_passes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "job.yaml").write_bytes(b"\xef\xbb\xbf" + JOB.replace("\n", "\r\n").encode())
    monkeypatch.chdir(world)
    assert call(["check", "job.yaml", "--no-model"], monkeypatch) == 0


def test_a_classifier_may_have_a_new_head(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CLASSIFY(world)
    monkeypatch.chdir(world)
    assert call(["check", "job.yaml"], monkeypatch) == 0


def test_a_sound_job_runs_and_overwrite_runs_it_again(
    finished: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_run(finished, world)
    (world / "runs" / "job" / "old").write_text("x")
    monkeypatch.chdir(world)
    assert call(["run", "job.yaml", "--overwrite"], monkeypatch) == 0
    assert not (world / "runs" / "job" / "old").exists()
    assert (world / "runs" / "job" / "results.json").is_file()


def test_debug_shows_the_traceback(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["weft", "--debug", "run", "jbo.yaml"])
    with pytest.raises(JobError, match="no job file"):
        cli.main()


def test_a_sentence_check_that_finds_nothing_would_be_worthless() -> None:
    """Give `check_sentence` what it must refuse: a traceback, two lines, record text, a missing word."""
    for errors in ("Traceback (most recent call last):\n", "error: a\nerror: b\n", f"error: {SECRET}\n", "error: b\n"):
        with pytest.raises(AssertionError):
            check_sentence(errors, ("a",))
