"""The report: whole, self-contained, true to its folder, safe with any name, drawn for every kind of run."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft import report
from weft.core.errors import JobError
from weft.report import sections
from weft.report.charts import short
from weft.report.folder import read

Json = dict[str, Any]
VOID = {"meta"}
EVIL = "<script>alert('$x$')</script>&\"A"
BETTER_UP = ("rougeL", "accuracy", "macro_f1")
BASE = {"loss": 3.9, "perplexity": 49.402449105530174, "rougeL": 0.11, "something": 5.25}


# --- run folders


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf8")


def scores(metrics: Json, groups: list[str], shift: float) -> Json:
    def moved(by: float) -> Json:
        signs = {name: 1 if name in BETTER_UP else -1 for name in metrics}
        return {name: v + signs[name] * (shift + by) / n for n, (name, v) in enumerate(metrics.items(), 3)}

    return {"overall": moved(0.0), "groups": {name: moved(0.01 * place) for place, name in enumerate(groups)}}


def personal(entry: Json, clients: list[str]) -> Json:
    own = {name: entry["groups"][name] for name in clients if name in entry["groups"]}
    return entry | {"own": own, "clients": dict.fromkeys(clients, entry["overall"])}


def journal(clients: list[str], rounds: int, *, every: int, error: float | None, cohort: int) -> list[Json]:
    rows: list[Json] = [{"round": 0, "evaluation": {"overall": {"loss": 4.0}, "groups": {}}}]
    for number in range(1, rounds + 1):
        chosen = [clients[(number + place) % len(clients)] for place in range(cohort)]
        told = {"weight": 3, "bytes_up": 1000, "bytes_down": 2000, "seconds": 0.5}
        row: Json = {
            "round": number,
            "cohort": chosen,
            "ignored": ["late <b>"] if number == 1 else [],
            "aggregation_error": error and error / number,
            "bytes_up": 1000 * cohort,
            "bytes_down": 2000 * cohort,
            "clients": {name: told | {"loss": 3 + 1 / number + place / 50} for place, name in enumerate(chosen)},
            "seconds": {"round": 1.25, "evaluation": 0.25},
            "peak_memory_mb": 512.0 + number,
        }
        if every and number % every == 0:
            row["evaluation"] = {"overall": {"loss": 2 + 2 / (number + 1)}, "groups": {}}
        rows.append(row)
    return rows


def split(clients: list[str], groups: list[str], classes: list[str]) -> Json:
    held = {
        name: {
            "size": 3 + place,
            "histogram": {classes[place % len(classes)]: 3 + place},
            "truncated": 1,
            "dropped": 0,
            "records": [],
        }
        for place, name in enumerate(clients)
    }
    return {
        "clients": held,
        "classes": classes,
        "kind": "label",
        "jensen_shannon": {"mean": 0.5, "max": 0.75},
        "sizes": {"min": 3, "median": 3 + (len(clients) - 1) / 2, "max": 2 + len(clients)},
        "sha256": "5" * 64,
        "train": {"records": 100, "skipped": 1, "bad": ["line 7: <i>no answer</i>"], "sha256": "6" * 64},
        "test": {"records": 20 * len(groups), "skipped": 0, "bad": [], "sha256": "7" * 64},
        "test_groups": dict.fromkeys(groups, 20),
    }


def make(
    folder: Path,
    *,
    clients: list[str] | None = None,
    groups: list[str] | None = None,
    methods: tuple[str, ...] = ("untrained", "local", "centralized", "federated"),
    metrics: Json = BASE,
    rounds: int = 3,
    every: int = 1,
    error: float | None = 0.05,
    cohort: int | None = None,
    own: bool = False,
    finished: bool = True,
) -> Path:
    """Write a run folder as the runner does, with made-up numbers."""
    clients = clients or ["north", EVIL, "south"]
    groups = clients if groups is None else groups
    job = {
        "model": {"name": "models/tiny", "revision": None, "dtype": "float32", "random": False},
        "adapter": {"lora": {"rank": 4}},
        "task": {"causal_lm": {"template": f"{EVIL} {{question}}"}},
        "data": {"split": {"by": {"column": "source"}}},
        "clients": {"per_round": cohort},
        "algorithm": {"fedavg": {}},
        "pipeline": [{"weigh": {"by": "examples"}}],
        "rounds": rounds,
        "evaluate": {"every": every},
        "seed": 7,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf8")
    write(folder / "run.json", {"job": "8" * 64})
    write(folder / "base.json", {"fingerprint": "9" * 64, "trainable": 1200, "total": 48000})
    write(folder / "split.json", split(clients, groups, [f"class {i} {EVIL}" for i in range(4)]))
    done = rounds if finished else rounds - 1
    rows = journal(clients, done, every=every, error=error, cohort=cohort or len(clients))
    for row in rows:
        if "accuracy" in metrics and "evaluation" in row:
            row["evaluation"]["overall"]["accuracy"] = 0.3 + row["round"] / 50
    lines = [json.dumps(row) for row in rows] + ([] if finished else ['{"round": 99, "torn'])
    (folder / "journal.jsonl").write_text("\n".join(lines), encoding="utf8")
    if finished:
        finish(folder, clients, groups, methods, metrics, own)
        rows = journal(["centralized"], rounds, every=every, error=None, cohort=1)
        baseline = folder / "baselines" / "centralized" / "journal.jsonl"
        baseline.parent.mkdir(parents=True, exist_ok=True)
        baseline.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    return folder


def finish(
    folder: Path, clients: list[str], groups: list[str], methods: tuple[str, ...], metrics: Json, own: bool
) -> None:
    found = {name: scores(metrics, groups, place * 0.7) for place, name in enumerate(methods)}
    for name in ("local", "federated") if own else ("local",):
        if name in found:
            found[name] = personal(found[name], clients)
    results = {
        "methods": found,
        "adapter": {"trainable": 1200, "total": 48000, "fingerprint": "9" * 64},
        "environment": {"torch": "2.6", "device": f"a {EVIL}"},
    }
    write(folder / "results.json", results)
    config = {"base_model_name_or_path": f"models/{EVIL}", "task_type": "CAUSAL_LM"}
    write(folder / "adapter" / "adapter_config.json", config)


def wide(count: int) -> list[str]:
    return [f"client-{place:04d}" for place in range(count)]


RUNS: dict[str, Json] = {
    "usual": {},
    "unfinished": {"finished": False},
    "before the first round": {"finished": False, "rounds": 1},
    "one round": {"rounds": 1},
    "two hundred rounds": {"rounds": 200},
    "one client": {"clients": ["only"], "groups": ["all"]},
    "a hundred clients": {"clients": wide(100), "cohort": 10},
    "a thousand clients, one test group": {
        "clients": wide(1000),
        "groups": ["all"],
        "cohort": 50,
        "rounds": 2,
    },
    "personal, without aggregation error": {"own": True, "error": None},
    "federated alone": {"methods": ("federated",)},
    "never evaluated between, no aggregation error": {"every": 0, "error": 0.0},
    "classification": {"metrics": {"loss": 2.0, "accuracy": 0.3, "macro_f1": 0.2}},
    "no metrics": {"metrics": {}},
    "not a number": {"metrics": {"loss": math.nan, "perplexity": math.inf}},
}


# --- what a page is


class Page(HTMLParser):
    """A page, read: what is not closed, what it would fetch, its ids and labels, the numbers of each table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.faults: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.images: list[str | None] = []
        self.tags: set[str] = set()
        self.tables: dict[str, list[list[float]]] = {}
        self.table, self.words = "", ""
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.stack.append(tag)
        self.look(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.look(tag, dict(attrs))

    def look(self, tag: str, attrs: dict[str, str | None]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs.items() if name == "id" and value]
        self.fetched += [value or "" for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
        if tag == "svg" and attrs.get("aria-hidden") != "true":
            self.images.append(attrs.get("aria-label"))
        if tag == "table":
            self.table = attrs.get("id") or ""
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag == "data":
            self.tables[self.table][-1].append(float(attrs["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        self.words += data


@dataclass(frozen=True)
class Shown:
    folder: Path
    text: str
    page: Page


Show = Callable[[str], Shown]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Show:
    """Return the report of a kind of run, written once for all tests."""

    @cache
    def show(name: str) -> Shown:
        folder = make(tmp_path_factory.mktemp("runs") / "run", **RUNS[name])
        text = report.write_report(folder).read_text(encoding="utf8")
        return Shown(folder, text, Page(text))

    return show


def test_the_check_of_pages_sees_a_tag_left_open_and_one_closed_twice() -> None:
    assert Page("<p><b>a</p>").faults
    assert Page("<p>a").faults
    assert Page("<p>a</p></p>").faults
    assert not Page("<p><b>a</b></p>").faults


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_gives_a_whole_page_that_fetches_nothing(shown: Show, name: str) -> None:
    """Fails for a tag left open, a link out, an id used twice, a chart without words, an unescaped name."""
    text, page = shown(name).text, shown(name).page
    assert page.faults == []
    assert [link for link in page.fetched if not link.startswith("#")] == []
    assert not re.search(r"url\((?!#)|@import", text)
    assert "http://" not in text
    assert "https://" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.fetched} <= set(page.ids)
    assert all(page.images)
    assert not page.tags & {"script", "b", "i", "link", "img", "iframe"}
    assert len(text) < 3_000_000


def test_names_and_texts_of_the_run_are_shown_and_never_obeyed(shown: Show) -> None:
    """Fails where a place writes a name as it is: the hostile one is a client, a class, in the job, the base."""
    page = shown("usual").page
    assert "<script" not in shown("usual").text
    assert page.words.count(EVIL) == 4  # two tables, the job, the environment
    assert page.words.count(short(EVIL)) == 2  # two charts
    assert page.words.count(json.dumps(EVIL)[1:-1]) == 2  # the base, loaded with its tokenizer
    assert "late <b>" in page.words
    assert "line 7: <i>no answer</i>" in page.words


def test_the_tables_hold_the_numbers_of_the_results(shown: Show) -> None:
    """Fails for a swapped column, a rounded value, a method left out."""
    page = shown("usual").page
    methods = json.loads((shown("usual").folder / "results.json").read_text())["methods"]
    assert page.tables["methods-table"][1:] == [list(entry["overall"].values()) for entry in methods.values()]
    local = methods["local"]
    columns = [methods["untrained"]["groups"], local["groups"], local["own"]]
    columns += [methods["centralized"]["groups"], methods["federated"]["groups"]]
    rows = [[column[group]["loss"] for column in columns] for group in methods["federated"]["groups"]]
    means = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
    assert page.tables["groups-table"][1:] == [*rows, means]


def test_the_best_of_the_trained_methods_is_marked(tmp_path: Path) -> None:
    """Fails when the untrained model may win, the direction is wrong, or an unknown metric gets a winner."""
    folder = make(tmp_path, groups=["all"])
    path = folder / "results.json"
    results = json.loads(path.read_text())
    values = {"untrained": (1.0, 0.9, 1.0), "local": (3.0, 0.3, 2.0)}
    values |= {"centralized": (2.0, 0.2, 3.0), "federated": (2.5, 0.4, 4.0)}
    for method, (loss, rouge, other) in values.items():
        results["methods"][method]["overall"] = {"loss": loss, "rougeL": rouge, "something": other}
    write(path, results)
    marked = sections.methods(read(folder))
    assert re.findall(r'class="best"><data value="([^"]+)"', marked) == ["2.0", "0.4"]


def test_the_headline_says_the_result_in_words(tmp_path: Path) -> None:
    """The shifts are 0, 0.7, 1.4, 2.1, a third of which comes off the loss of 3.9: 3.9, 3.67, 3.43, 3.2."""
    run = read(make(tmp_path))
    said = "Federated: test loss 3.20, against 3.90 untrained, 3.67 local-only (mean) and 3.43 centralized"
    assert report.headline(run) == said
    alone = read(make(tmp_path / "alone", methods=("federated",)))
    assert report.headline(alone) == "Federated: test loss 3.90"


def test_an_unfinished_run_says_so_and_shows_its_curves(shown: Show) -> None:
    """Two of three rounds: the loss after the second is 2 + 2/3. Fails when the torn last line counts."""
    text, page = shown("unfinished").text, shown("unfinished").page
    assert "Not finished: round 2 of 3; test loss 2.67 after round 2" in page.words
    assert 'id="test-loss-' in text
    assert "methods-table" not in page.tables


def test_a_chart_that_shows_a_part_says_so(shown: Show) -> None:
    """Fails when clients are cut in silence, or when the table is cut with the chart."""
    page = shown("a hundred clients").page
    assert "The first 40 of 100 clients." in page.words
    assert "The first 30 of 100 groups." in page.words
    assert len(page.tables["clients-table"]) == 101
    assert len(page.tables["groups-table"]) == 102


def test_key_figures_are_the_journals(shown: Show) -> None:
    """3 clients in 3 rounds send 1 kB and get 2 kB each: 9 and 18 kB; 3 x 1.5 s; 1200 of 48000 is 2.5 %."""
    page = shown("usual").page
    for figure in (
        "9 kB up, 18 kB down",
        "27 kB",
        "1 kB up, 2 kB down",
        "4.50 s",
        "2.50% of 48,000",
        "515 MiB",
    ):
        assert figure in page.words


def test_a_table_of_many_clients_shows_those_that_were_asked_most(tmp_path: Path) -> None:
    """1,500 clients and groups, two are asked and stand first: a thousand rows each, and it says so."""
    names = [f"client-{place:04d}" for place in range(1500)]
    folder = make(tmp_path / "many", clients=names, cohort=2)
    rows = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    for row in rows:
        if row["round"]:
            row["clients"] = dict(zip(names[-2:], row["clients"].values(), strict=True))
    (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = report.write_report(folder).read_text(encoding="utf8")
    asked, groups = (html[html.index(f'<table id="{name}"') :].partition("</table>")[0] for name in TABLES)
    assert asked.count("<tr>") <= 1000 + 2
    assert names[-1] in asked
    assert names[997] in asked
    assert names[998] not in asked
    assert "the 1,000 of 1,500 that were asked most often" in html
    assert names[999] in groups
    assert names[1000] not in groups
    assert "the first 1,000 of 1,500, results.json holds all" in html


TABLES = ("clients-table", "groups-table")


def test_the_same_folder_gives_the_same_bytes(shown: Show, tmp_path: Path) -> None:
    """Fails for a date, a random id or the folder's own name in the page, or when the last report is read."""
    first = shown("usual").text.encode()
    assert report.write_report(shown("usual").folder).read_bytes() == first
    assert report.write_report(make(tmp_path / "other name")).read_bytes() == first
    assert shown("one round").text.encode() != first


def test_a_classifier_is_loaded_with_its_labels(tmp_path: Path) -> None:
    folder = make(tmp_path)
    write(folder / "adapter" / "adapter_config.json", {"base_model_name_or_path": "b", "task_type": "SEQ_CLS"})
    code = sections.loading(read(folder))
    assert 'AutoModelForSequenceClassification.from_pretrained("b"' in code
    assert "num_labels=4" in code


def test_a_folder_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="not a run folder"):
        report.write_report(tmp_path)


def test_a_report_needs_no_torch() -> None:
    """Fails when an import of the report reaches the engine: a page must not take seconds and gigabytes."""
    code = "import sys, weft.report; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_clients_that_were_dropped_or_asked_again_are_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    path = run / "journal.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    rows[2] |= {"dropped": {"gone": "the disk is full"}, "asked_again": {"slow": "no reply"}, "drift": 0.125}
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf8")
    page = report.write_report(run).read_text(encoding="utf8")
    assert "round 2: dropped gone: the disk is full" in page
    assert "round 2: asked slow again: no reply" in page
    assert "0.125" in page
