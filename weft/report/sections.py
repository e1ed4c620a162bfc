"""The report's sections on scores, data and provenance: from what a run folder holds to tables and charts."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from weft.report import charts
from weft.report.charts import Frame
from weft.report.folder import LABELS, METRICS, MOST_ROWS, Folder, Row, better, label, section, total
from weft.report.markup import (
    NONE,
    Html,
    dot,
    exact,
    items,
    number,
    pairs,
    places,
    says,
    table,
    text,
)

ROWS, CLASSES, GROUPS = 40, 30, 30  # the most that a chart shows; the tables show up to MOST_ROWS
SAME = "All methods start from the same base and adapter and are measured on the same held-out records."
OWN = "“Own adapter”: each client's adapter on its own group; “(mean)”: all clients' adapters on that group."

Column = tuple[str, str, Mapping[str, Any]]  # label, colour, group -> value


# --- methods and groups


def methods(run: Folder) -> str:
    """Return the table of methods and metrics."""
    if not run.methods:
        return says("The run is not finished; the final measurements are its last step.")
    names = list(dict.fromkeys(name for entry in run.methods.values() for name in entry["overall"]))
    columns = {name: _marked({m: e["overall"].get(name) for m, e in run.methods.items()}, name) for name in names}
    rows = [[dot(LABELS.get(m, m), m), *(columns[name][m] for name in names)] for m in run.methods]
    return says(SAME) + table(
        "Test metrics of each method; the best of the trained ones is marked",
        ["Method", *map(_head, names)],
        rows,
        name="methods-table",
    )


def _head(metric: str) -> Html:
    name, direction = METRICS.get(metric, (metric, 0))
    way = {-1: "↓ lower is better", 0: "", 1: "↑ higher is better"}[direction]
    return Html(f"{text(name[:1].upper() + name[1:])}<small>{way}</small>")


def _marked(values: Mapping[str, Any], metric: str, decimals: int | None = None) -> dict[str, Html]:
    """Return a metric's numbers, the best of the trained ones marked unless all are equal."""
    trained = [_value(v) for name, v in values.items() if name != "untrained"]
    trained = [value for value in trained if math.isfinite(value)]
    top = trained[0] if trained else math.nan
    for value in trained:
        top = value if better(value, top, metric) else top
    differ = metric in METRICS and len(set(trained)) > 1
    decimals = places(values.values()) if decimals is None else decimals
    return {m: exact(v, decimals, best=differ and m != "untrained" and v == top) for m, v in values.items()}


def _columns(run: Folder) -> dict[str, Column]:
    """Return each method's scores by group; `own`: a client's own adapter on its own group."""
    found: dict[str, Column] = {}
    for name, entry in run.methods.items():
        served = " (mean)" if name != "local" and "own" in entry else ""
        found[name] = LABELS.get(name, name) + served, name, _scores(entry["groups"], run.metric)
        if entry.get("own"):
            role = "own" if name == "local" else "second"
            label_ = f"{name.capitalize()}, own adapter"
            found[f"{name}-own"] = label_, role, _scores(entry["own"], run.metric)
    return found


def _client_columns(run: Folder) -> dict[str, Column]:
    """Return the scores of the clients' own adapters on all test records."""
    return {
        name: (f"{name.capitalize()}, own adapter", name, _scores(entry["clients"], run.metric))
        for name, entry in run.methods.items()
        if entry.get("clients")
    }


def _scores(rows: Mapping[str, Row], metric: str) -> dict[str, Any]:
    return {name: row.get(metric) for name, row in rows.items()}


def _names(columns: Mapping[str, Column]) -> list[str]:
    return list(dict.fromkeys(name for _, _, scores in columns.values() for name in scores))


def groups(run: Folder) -> str:
    """Return the scores of each test group, or of each client's adapter where the test set is one group."""
    if not run.methods:
        return says("Measured at the end of the run.")
    columns = _columns(run)
    if len(_names(columns)) > 1:
        lead = f"The records of each test group, measured apart: {label(run.metric)}."
        own = any(key.endswith("-own") for key in columns)
        return says(lead, *[OWN] * own) + _compared(run, columns, "group", run.split.get("test_groups", {}))
    columns = _client_columns(run)
    if len(_names(columns)) < 2:
        return says("The test records are one group, so the table of methods says all.")
    sizes = {name: client["size"] for name, client in run.split.get("clients", {}).items() if "size" in client}
    lead = "The test records are one group; here is each client's own adapter on all of them"
    return says(f"{lead}: {label(run.metric)}.") + _compared(run, columns, "client", sizes)


def _compared(run: Folder, columns: Mapping[str, Column], noun: str, sizes: Mapping[str, int]) -> str:
    """Return bars and a table of scores for each group or client."""
    names, title = _names(columns), f"Test {label(run.metric)}, by {noun}"
    shown = names[:GROUPS]
    some = f"The first {GROUPS} of {len(names):,} {noun}s." if len(names) > GROUPS else ""
    drawn = {told: (role, [_value(scores.get(n)) for n in shown]) for told, role, scores in columns.values()}
    frame = Frame("groups", title, f"{title}. {some} The table has the numbers.", some, wide=True)
    decimals = places(value for _, _, scores in columns.values() for value in scores.values())
    rows = []
    for name in names[:MOST_ROWS]:
        values = {key: scores.get(name) for key, (_, _, scores) in columns.items()}
        count = f"{sizes[name]:,}" if name in sizes else NONE
        rows.append([name, count, *_marked(values, run.metric, decimals).values()])
    means = [exact(_mean([s.get(name) for name in names]), decimals) for _, _, s in columns.values()]
    kind = "Test" if noun == "group" else "Training"
    if len(names) > MOST_ROWS:
        title += f"; the first {MOST_ROWS:,} of {len(names):,}, results.json holds all"
    heads = [noun.capitalize(), f"{kind} records", *(dot(told, role) for told, role, _ in columns.values())]
    foot = [f"Mean over {noun}s", f"{sum(sizes.values()):,}", *means]
    return charts.bars(frame, shown, drawn, number) + table(title, heads, rows, foot, "groups-table")


def _mean(values: Sequence[Any]) -> float | None:
    return sum(values) / len(values) if values and all(isinstance(v, int | float) for v in values) else None


def _value(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


# --- data


def data(run: Folder) -> str:
    """Return who has which records."""
    clients = run.split.get("clients", {})
    if not clients:
        return says("The split is not written yet.")
    return f'<dl class="cards small">{pairs(_data_facts(run.split))}</dl>' + _heat(run.split)


def _data_facts(split: Row) -> list[Sequence[str]]:
    clients, train, test = split["clients"].values(), split.get("train", {}), split.get("test", {})
    sizes, apart = split.get("sizes", {}), split.get("jensen_shannon", {})
    dropped, skipped = total(clients, "dropped"), train.get("skipped", 0) + test.get("skipped", 0)
    held = total(clients, "size")
    return [
        ("Training records", f"{held:,}" if held else NONE, f"{_span(sizes)} per client" if sizes else ""),
        ("Test records", f"{test.get('records', 0):,}", _test_groups(split.get("test_groups", {}))),
        (
            "Client distance",
            number(apart.get("mean")),
            f"mean Jensen-Shannon, 0 to 1; largest {number(apart.get('max'))}{_compared_of(apart)}",
        ),
        ("Cut to max_length", f"{total(clients, 'truncated'):,}", "training records"),
        ("Left out", f"{dropped + skipped:,}", f"{skipped:,} bad, {dropped:,} cut to nothing"),
    ]


def _compared_of(apart: Row) -> str:
    return f"; among {apart['clients']:,} of them" if "clients" in apart else ""


def _span(sizes: Row) -> str:
    low, high = sizes["min"], sizes["max"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, median {sizes['median']:,g},"


def _test_groups(sizes: Mapping[str, int]) -> str:
    counts = sorted(sizes.values())
    if len(counts) < 2:
        return "in one group"
    span = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
    return f"in {len(counts):,} groups of {span}"


def _heat(split: Row) -> str:
    clients, classes = split["clients"], split.get("classes", [])
    shown, kept = list(clients)[:ROWS], classes[:CLASSES]
    if not kept:
        return ""
    counts = [[clients[name]["histogram"].get(kind, 0) for kind in kept] for name in shown]
    some = [f"The first {ROWS} of {len(clients):,} clients."] if len(clients) > ROWS else []
    some += [f"The first {CLASSES} of {len(classes):,} classes."] if len(classes) > CLASSES else []
    kinds = {"label": "label", "column": "value of the split's column", "topic": "topic of the text"}
    kind = kinds.get(split.get("kind", ""), "class")
    note = " ".join([f"Records of each client (row) by {kind} (column); the stronger, the larger its share.", *some])
    alt = f"Records of {len(shown)} clients over {len(kept)} classes. {' '.join(some)}".strip()
    sums = [clients[name]["size"] for name in shown]
    return charts.heat(Frame("split", "Who holds what", alt, note, wide=True), shown, kept, counts, sums)


# --- adapter, notices, fingerprints


def adapter(run: Folder) -> str:
    """Return the lines of Python that load the adapter with transformers and peft."""
    if not run.config:
        return says("The adapter is written when the federated rounds are finished.")
    said = ["Plain transformers and peft, from inside the run folder; Weft is not needed."]
    if section(run.job, "model").get("random"):
        said.append("This run's base has random weights (model.random), which only Weft makes again.")
    if "own" in run.methods.get("federated", {}):
        said.append("It is the shared part; each client's own adapter stays with the client.")
    return says(*said) + f"<pre><code>{text(loading(run))}</code></pre>"


def loading(run: Folder) -> str:
    """Return a program that loads the run's base and adapter."""
    base, revision = (
        json.dumps(run.config.get("base_model_name_or_path")),
        section(run.job, "model").get("revision"),
    )
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    kind, keys = "AutoModelForCausalLM", f'{pinned}, dtype="{section(run.job, "model").get("dtype", "auto")}"'
    if run.config.get("task_type") == "SEQ_2_SEQ_LM":
        kind = "AutoModelForSeq2SeqLM"
    if run.config.get("task_type") == "SEQ_CLS":
        kind = "AutoModelForSequenceClassification"
        keys += f", num_labels={len(run.split.get('classes', []))}, pad_token_id=tokenizer.pad_token_id"
    return (
        f"from peft import PeftModel\nfrom transformers import {kind}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base}{pinned})\n"
        f"model = {kind}.from_pretrained({base}{keys})\n"
        'model = PeftModel.from_pretrained(model, "adapter").eval()\n'
    )


def notices(run: Folder) -> str:
    """Return what the run went past without stopping: replies and records."""
    rows = []
    for method, found in run.journals.items():
        for row in found:
            place = f"{LABELS.get(method, method)}, round {row['round']}"
            if row.get("ignored"):
                rows.append(f"{place}: ignored {', '.join(row['ignored'])}")
            if row.get("empty"):
                rows.append(f"{place}: {row['empty']}")
            for client, reason in row.get("dropped", {}).items():
                rows.append(f"{place}: dropped {client}: {reason}")
            for client, reason in row.get("asked_again", {}).items():
                rows.append(f"{place}: asked {client} again: {reason}")
    for part in ("train", "test"):
        rows += [f"{part} data, skipped {reason}" for reason in run.split.get(part, {}).get("bad", [])]
    said = items(rows) if rows else says("No client was dropped, no reply was ignored, and no record was skipped.")
    return f'<h3>Notices</h3><div class="note">{said}</div>' if rows else f"<h3>Notices</h3>{said}"


def fingerprints(run: Folder) -> dict[str, Any]:
    """Return the hashes that two equal runs share."""
    found = {
        "job": run.start.get("job"),
        "base and tokenizer": run.base.get("fingerprint"),
        "split": run.split.get("sha256"),
        "training data": run.split.get("train", {}).get("sha256"),
        "test data": run.split.get("test", {}).get("sha256"),
    }
    return {name: Html(f"<code>{text(value)}</code>") for name, value in found.items() if value}
