"""Every command, program and job in the documentation runs, or would run at full size; what is generated is current.

The commands of a page run as they stand, in order, in one working copy whose examples are made small: each eighth
record, one round, one answer a group, one baseline. `make`, `git`, `pip` and the like are not run: a target must exist.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft import cli, job, yaml12
from weft.runs import Run
from weft.suite.suite import load_suite

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/jobs.md", "docs/suites.md", "docs/glossary.md")
BLOCK = re.compile(r"^( *)```(\w+)(?: ([\w./-]+))?\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
NOT_RUN = ("python3 -m venv", ". .venv/bin/activate", "python -m pip install")
SMALL = {"rounds": 1, "baselines": ["untrained"]}


def blocks(page: str, *languages: str) -> list[tuple[str, str, str]]:
    """Return (language, file name, text) of a page's fenced blocks, in order."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf8"))
    rows = [(language, name, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, language, name, text in found]
    return [row for row in rows if row[0] in languages]


def writer() -> Any:
    """Return docs/write.py as a module."""
    spec = importlib.util.spec_from_file_location("write", ROOT / "docs" / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the working copy: the examples, small, and the files that the pages tell a reader to write."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for path in (folder / "examples" / "data").glob("*/*.jsonl"):
        lines = path.read_text(encoding="utf8").splitlines(keepends=True)
        path.write_text("".join(lines[::8]), encoding="utf8")
    for path in (folder / "examples").glob("*.yaml"):
        values = yaml12.read(path.read_text(encoding="utf8"), path.name)[0] | SMALL
        values["evaluate"] |= {"examples": 1, "max_new_tokens": 4} if "causal_lm" in values["task"] else {}
        path.write_text(yaml.safe_dump(values), encoding="utf8")
    for _, name, text in (row for page in PAGES for row in blocks(page, "json", "yaml", "python") if row[1]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf8")
    shutil.copy(folder / "clinic.jsonl", folder / "clinic-test.jsonl")
    return folder


@pytest.fixture
def copy(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in the working copy, where a reader would."""
    monkeypatch.chdir(shared)
    monkeypatch.syspath_prepend(str(shared))
    before = dict(os.environ)
    yield shared
    os.environ.clear()
    os.environ.update(before)


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `weft ...` in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE))


def follow(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a line of a bash block says, or check that it could be done."""
    words = shlex.split(line)
    if words[0] == "PYTHONPATH=.":
        words = words[1:]
    if words[0] == "make":
        assert set(words[1:]) <= targets(), line
    elif words[0] == "weft":
        # The demo is run once: `make demo` and the command by hand write the same folder.
        again = words[:2] == ["weft", "run"] and "runs/demo" in words and Path("runs/demo").exists()
        extra = ["--overwrite"] if again and "--resume" not in words else []
        assert call([*words, *extra], monkeypatch) == 0, line
    else:
        assert line.startswith(NOT_RUN), f"{line}: say in NOT_RUN that this is not run, or make it run"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_programs_run(
    page: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for language, name, text in blocks(page, "bash", "python"):
        if language == "python" and not name:
            exec(compile(text, page, "exec"), {})
        for line in text.splitlines() if language == "bash" else ():
            capsys.readouterr()
            follow(line, monkeypatch)


def test_what_the_readme_does_leaves_what_it_says(copy: Path) -> None:
    """Depends on the test above: the adapter, the merged model and the run of the reader's own algorithm are there."""
    if not (copy / "runs").exists():
        pytest.skip("runs after the test of the README's commands")
    assert (copy / "my-adapter" / "adapter_model.safetensors").is_file()
    assert (copy / "my-model" / "model.safetensors").is_file()
    assert (copy / "runs" / "demo" / "report.html").is_file()
    damped = Run(copy / "runs" / "damped")
    assert damped.job.algorithm.to_job() == {"mine.damped:damped": {"rate": 0.7}}
    assert damped.history[-1]["test_loss"] < damped.history[0]["test_loss"]


@pytest.mark.parametrize("page", PAGES)
def test_jobs_are_sound(page: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job without a name stands for one in examples/, where its paths count from."""
    for place, (_, name, text) in enumerate(blocks(page, "yaml")):
        path = copy / (name or f"examples/{Path(page).stem}-{place}.yaml")
        path.write_text(text, encoding="utf8")
        if "grid:" in text:
            (path.parent / "suites").mkdir(exist_ok=True)
            assert load_suite(path.rename(path.parent / "suites" / path.name)).cells
            continue
        job.load(path)
        assert call(["weft", "check", str(path), "--no-model"], monkeypatch) == 0


def test_generated_parts_are_current() -> None:
    """The tree, the tables of keys and plug-ins, and the results are what docs/write.py writes."""
    write = writer()
    stale = [page.name for page in write.PAGES if write.written(page.read_text("utf8")) != page.read_text("utf8")]
    assert stale == [], "run `make docs`"


def test_a_stale_part_is_found() -> None:
    """Negative control: a table with another number is written anew."""
    write = writer()
    text = (ROOT / "README.md").read_text(encoding="utf8")
    changed = text.replace("**federated** | 2", "**federated** | 1")
    assert changed != text
    assert write.written(changed) == text


def test_every_file_stands_in_the_tree_and_nothing_else() -> None:
    listed = set(re.findall(r"[\w.]+\.(?:py|css|html)", writer().tree())) - {"write.py"}
    there = {path.name for path in (ROOT / "weft").rglob("*") if path.suffix in (".py", ".css", ".html")}
    assert listed == there - {"__init__.py"}


@pytest.mark.parametrize("name", ["medquad", "banking77"])
def test_the_results_are_those_of_the_example_as_it_stands(name: str) -> None:
    """A changed example needs new results; a key that is new to Weft does not change an old run."""
    kept = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf8"))
    now = job.load(ROOT / "examples" / f"{name}.yaml").resolved()
    assert differing(kept["job"], now) == [], f"run the example and `docs/write.py {name}=RUN`"


def differing(kept: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(kept, dict) and isinstance(now, dict):
        return [row for key in kept for row in differing(kept[key], now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if kept == now else [path]


def test_a_difference_of_jobs_is_named() -> None:
    assert differing({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2, "d": 4}) == ["a.b"]


def test_every_promise_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "README.md").read_text(encoding="utf8"))
    assert len(named) >= 8
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf8"), f"{file}::{test}"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), target
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [head.lower().replace(" ", "-").replace("`", "") for head in heads], target


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "report.png").stat().st_size < 250_000
