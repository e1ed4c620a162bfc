"""A job: defaults written out, a hash of every value and of nothing else, one sentence for a mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from weft.core.errors import JobError, KeyProblem
from weft.job import Job, load

LEAST = """\
model: {name: base}
adapter: lora
task: causal_lm
data: {train: train.jsonl, test: test.jsonl, split: {by: site}}
"""

EXAMPLE = Path(__file__).parent.parent / "examples" / "medquad.yaml"


def least(**changes: Any) -> Job:
    """Return the job of LEAST, built in code."""
    data = {"train": "train.jsonl", "test": "test.jsonl", "split": {"by": "site"}}
    return Job(**{"model": {"name": "base"}, "adapter": "lora", "task": "causal_lm", "data": data} | changes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(LEAST)
    return path


def test_resolved_writes_every_default_out() -> None:
    resolved = least().resolved()
    lora = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "auto", "rslora": False}
    assert lora.items() <= resolved["adapter"].pop("lora").items()
    assert resolved == {
        "model": {"name": "base", "revision": None, "dtype": "float32", "quantize": None, "random": False},
        "adapter": {},
        "task": {"causal_lm": {"template": "auto", "max_length": 512, "language": "en"}},
        "data": {
            "train": "train.jsonl",
            "test": "test.jsonl",
            "split": {"by": {"column": "site"}},
            "columns": {},
            "on_bad_record": "refuse",
            "bad_record_cap": 0.01,
            "limit": None,
        },
        "clients": {"per_round": None, "sampler": {"uniform": {}}, "pace": None, "devices": {}, "ranks": {}},
        "local": {
            "optimizer": "adamw",
            "lr": 2e-4,
            "batch": 8,
            "accumulate": 1,
            "epochs": 1,
            "steps": None,
            "schedule": "constant",
            "warmup": 0.0,
            "clip": 1.0,
            "weight_decay": 0.0,
            "momentum": 0.0,
            "moments": "reset",
            "checkpointing": False,
            "dp": None,
        },
        "privacy": {"delta": 1e-5, "epsilon": None},
        "algorithm": {"fedavg": {}},
        "pipeline": [{"weigh": {"by": "examples", "cap": 2**20}}],
        "downlink": [],
        "budget": {"megabytes": None},
        "failures": {"on_client_failure": "abort", "retries": 2, "quorum": 0.5, "on_nan": "abort", "deadline": None},
        "sites": {},
        "rounds": 10,
        "evaluate": {"every": 1, "on": None, "examples": None, "max_new_tokens": 64, "batch": 32, "per_example": False},
        "baselines": ["untrained"],
        "seed": 0,
    }


@pytest.mark.parametrize("text", [LEAST, EXAMPLE.read_text()], ids=["least", "example"])
def test_a_resolved_job_loads_to_the_same_job(text: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(text)
    second.write_text(yaml.safe_dump(load(first).resolved()))
    assert load(second) == load(first)
    assert load(second).hash() == load(first).hash()


def test_a_job_built_in_code_is_the_job_of_the_file(file: Path) -> None:
    built = least(folder=file.parent)
    assert built == load(file)
    assert built.hash() == load(file).hash()


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"lora": None}, "task": {"causal_lm": {}}, "algorithm": {"fedavg": None}},
        {"pipeline": ["weigh"]},
        {"pipeline": ({"weigh": "examples"},), "baselines": ("untrained",)},
        {"data": {"train": "train.jsonl", "test": "test.jsonl", "split": {"by": {"column": "site"}}}},
        {"folder": "elsewhere"},
        {"folder": Path("elsewhere"), "rounds": 10, "local": {}},
    ],
    ids=["null keys", "a name", "a scalar and tuples", "no shorthand", "folder", "defaults"],
)
def test_the_hash_is_of_the_values_and_not_of_how_they_are_written(changes: dict[str, Any]) -> None:
    assert least(**changes).hash() == least().hash()


CHANGES: list[dict[str, Any]] = [
    {"model": {"name": "other"}},
    {"model": {"name": "base", "revision": "v2"}},
    {"model": {"name": "base", "dtype": "bfloat16"}},
    {"model": {"name": "base", "random": True}},
    {"adapter": {"lora": {"rank": 9}}},
    {"task": {"causal_lm": {"max_length": 511}}},
    {"task": "classification"},
    {"data": {"train": "train.jsonl", "test": "test.jsonl", "split": {"by": "label"}}},
    {"data": {"train": "train.jsonl", "test": "test.jsonl", "split": {"iid": 2}}},
    {"data": {"train": "train.jsonl", "test": "test.jsonl", "split": {"by": "site"}, "limit": 5}},
    {"clients": {"per_round": 2}},
    {"algorithm": "local"},
    {"pipeline": [{"weigh": "uniform"}]},
    {"pipeline": []},
    {"rounds": 11},
    {"baselines": []},
    {"baselines": ["untrained", "local"]},
    {"seed": 1},
    *(
        {"local": {key: value}}
        for key, value in {
            "lr": 3e-4,
            "batch": 9,
            "accumulate": 2,
            "epochs": 2,
            "steps": 5,
            "schedule": "linear",
            "warmup": 0.1,
            "clip": None,
            "weight_decay": 0.1,
            "moments": "keep",
            "checkpointing": True,
            "optimizer": "sgd",
        }.items()
    ),
    {"local": {"optimizer": "sgd", "momentum": 0.9}},
    *(
        {"evaluate": {key: value}}
        for key, value in {"every": 2, "on": ["loss"], "examples": 3, "max_new_tokens": 65, "batch": 31}.items()
    ),
]


def test_the_hash_changes_with_every_value() -> None:
    hashes = [least(**changes).hash() for changes in [{}, *CHANGES]]
    assert len(set(hashes)) == len(CHANGES) + 1
    assert all(len(text) == 64 for text in hashes)


def test_a_job_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        least().rounds = 3  # type: ignore[misc]


def test_paths_count_from_the_file(file: Path) -> None:
    assert load(file).folder == file.parent


# --- mistakes

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"round": 1}, "round: unknown key; did you mean `rounds`? (known: adapter, "),
    "nested": ({"local": {"lrr": 1}}, "local.lrr: unknown key; did you mean `lr`? (known: accumulate, "),
    "plug-in key": ({"adapter": {"lora": {"rang": 1}}}, "adapter.lora.rang: unknown key; did you mean `rank`? "),
    "plug-in": ({"algorithm": "fedavgg"}, "algorithm: there is no algorithm `fedavgg`; did you mean `fedavg`? "),
    "type": ({"rounds": "ten"}, "rounds: must be a whole number, got 'ten'"),
    "a float that is whole": ({"rounds": 2.0}, "rounds: must be a whole number, got 2.0"),
    "a truth": ({"rounds": True}, "rounds: must be a whole number, got true"),
    "no number": ({"local": {"lr": float("nan")}}, "local.lr: must be a finite number, got nan"),
    "a word for a list": ({"baselines": "local"}, "baselines: must be a list, got 'local'"),
    "a place in a list": (
        {"baselines": ["local", "best"]},
        "baselines[1]: must be 'untrained', 'local' or 'centralized', got 'best'",
    ),
    "a section": ({"local": [1]}, "local: must be a mapping of keys, got a list"),
    "two at odds": ({"local": {"epochs": 2, "steps": 3}}, "local: give epochs or steps, not both"),
    "momentum": ({"local": {"momentum": 0.5}}, "local: momentum is a key of sgd"),
    "missing": ({"model": {}}, "model.name: is missing"),
    "empty": ({"model": {"name": ""}}, "model.name: must not be empty, got ''"),
    "alternatives": (
        {"adapter": {"lora": {"targets": 3}}},
        "adapter.lora.targets: must be 'auto' or 'all-linear' or a list, got 3",
    ),
    "an alternative's item": (
        {"adapter": {"lora": {"targets": ["q", ".*"]}}},
        "adapter.lora.targets[1]: must have the form ",
    ),
    "an object": ({"adapter": {"lora": {"rank": object()}}}, "adapter.lora: the keys must hold text, numbers"),
    "pipeline": ({"pipeline": "weigh"}, "pipeline: must be a list of transforms"),
    "a step": ({"pipeline": ["weigh", 3]}, "pipeline[1]: name one transform"),
}


@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_code_is_a_job_error_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyProblem) as caught:
        least(**changes)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model", "adapter", "task", "data"])
def test_what_a_job_must_have(missing: str, file: Path) -> None:
    lines = LEAST.splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(missing)))
    with pytest.raises(JobError, match=rf"^job.yaml: {missing}: is missing$"):
        load(file)


def test_nothing_at_all_is_a_job_error() -> None:
    with pytest.raises(JobError, match="is missing"):
        Job()


def test_an_error_names_file_and_line(file: Path) -> None:
    file.write_text(LEAST + "local:\n  batch: 4\n  lr: fast\n")
    with pytest.raises(JobError, match=r"^job.yaml, line 7: local.lr: must be a number, got 'fast'$"):
        load(file)


def test_a_missing_key_has_the_line_of_its_section(file: Path) -> None:
    file.write_text(LEAST.replace(", split: {by: site}", ""))
    with pytest.raises(JobError, match=r"^job.yaml, line 4: data.split: is missing$"):
        load(file)


# --- located


def test_an_error_raised_later_gets_the_line_of_its_key(file: Path) -> None:
    with pytest.raises(JobError, match=r"^job.yaml, line 2: adapter.lora.rank: too much$"), load(file).located():
        raise JobError("adapter.lora.rank: too much")


@pytest.mark.parametrize("text", ["data.jsonl:3: is not JSON", "model: is a folder", "something else", "data.x: y"])
def test_an_error_of_something_else_than_a_key_stays_as_it_is(file: Path, text: str) -> None:
    with pytest.raises(JobError) as caught, load(file).located():
        raise JobError(text)
    assert str(caught.value) == text


def test_a_job_built_in_code_has_no_lines() -> None:
    with pytest.raises(JobError, match=r"^data.train: gone$"), least().located():
        raise JobError("data.train: gone")


# --- --set


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("rounds=3", ("rounds",), 3),
        ("local.lr=1e-4", ("local", "lr"), 1e-4),
        ("local.clip=null", ("local", "clip"), None),
        ("adapter.lora.rank=4", ("adapter", "lora", "rank"), 4),
        ("adapter.lora={rank: 4}", ("adapter", "lora", "rank"), 4),
        ("adapter.lora.targets=[q_proj]", ("adapter", "lora", "targets"), ["q_proj"]),
        ("task.causal_lm.template='Q: {question} A='", ("task", "causal_lm", "template"), "Q: {question} A="),
        ("task=classification", ("task", "classification", "max_length"), 128),
        ("data.split={iid: 3}", ("data", "split", "iid", "clients"), 3),
        ("data.split.by=label", ("data", "split", "by", "column"), "label"),
        ("evaluate.on=[loss]", ("evaluate", "on"), ["loss"]),
        ("baselines=[]", ("baselines",), []),
    ],
)
def test_set(file: Path, override: str, place: tuple[str, ...], value: Any) -> None:
    found: Any = load(file, [override]).resolved()
    for step in place:
        found = found[step]
    assert found == value


def test_a_later_set_wins(file: Path) -> None:
    assert load(file, ["rounds=3", "rounds=4"]).rounds == 4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rounds", "--set rounds: write key=value, such as local.lr=1e-3"),
        ("=3", "--set =3: write key=value, such as local.lr=1e-3"),
        ("local..lr=3", "--set local..lr=3: write key=value, such as local.lr=1e-3"),
        ("rounds=ten", "--set rounds: must be a whole number, got 'ten'"),
        ("rounds.x=1", "--set rounds.x=1: `rounds` holds no keys in this job"),
        ("adapter.lora.rank=0", "--set adapter.lora.rank: must be more than 0, got 0"),
        ("adapter={lora: {rank: 0}}", "--set adapter.lora.rank: must be more than 0, got 0"),
        ("adapter.ia3.rank=1", "job.yaml, line 2: adapter: name one adapter, as `name` or `{name: {key: value}}`"),
    ],
)
def test_a_wrong_set(file: Path, override: str, sentence: str) -> None:
    file.write_text(LEAST + "rounds: 2\n")
    with pytest.raises(JobError) as caught:
        load(file, [override])
    assert str(caught.value).partition(" (known")[0] == sentence
