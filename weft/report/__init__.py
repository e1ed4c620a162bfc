"""The report of a run: one self-contained page, drawn from the run folder alone, finished or not."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from weft.files import write_safely
from weft.report import charts, rounds, sections
from weft.report.charts import Frame
from weft.report.folder import LABELS, METRICS, Folder, Row, better, label, read, seconds, section, total
from weft.report.markup import NONE, facts, memory, pairs, period, says, size, told
from weft.report.privacy import privacy

WORDS = {"untrained": "untrained", "local": "local-only (mean)", "centralized": "centralized"}


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from the run folder, and return its path; equal folders give equal bytes.

    Raise JobError where there is no run.
    """
    path = folder / "report.html"
    write_safely(path, page(read(folder)).encode())
    return path


def page(run: Folder) -> str:
    """Return the whole page."""
    here = Path(__file__)
    template = Template(here.with_name("page.html").read_text(encoding="utf8"))
    environment = run.results.get("environment") or {"environment": "written when the run is finished"}
    return template.substitute(
        title=escape(f"Weft: {_name(run.job.get('algorithm'))} on {run.model}"),
        style=here.with_name("page.css").read_text(encoding="utf8"),
        headline=escape(headline(run)).replace(WORDS["local"], f'<span class="whole">{WORDS["local"]}</span>'),
        lead=says(*_lead(run)),
        chips=pairs(_chips(run.job, run.model)),
        ranking=_ranking(run),
        cards=pairs(_cards(run)),
        methods=sections.methods(run),
        curves=rounds.curves(run),
        groups=sections.groups(run),
        data=sections.data(run),
        traffic=rounds.traffic(run),
        privacy=privacy(run),
        adapter=sections.adapter(run),
        job=escape(run.text),
        notices=sections.notices(run),
        environment=facts(environment),
        fingerprints=facts(sections.fingerprints(run)),
    )


def headline(run: Folder) -> str:
    """Say the result in one sentence."""
    metric = run.metric
    word = METRICS.get(metric, (metric, 0))[0]
    if not run.methods:
        last = run.test_curve("federated", metric)[-1:]
        so_far = f"; test {word} {told(last[0][1])} after round {last[0][0]}" if last else ""
        return f"Not finished: round {_done(run)} of {run.job.get('rounds', NONE)}{so_far}"
    scores = {name: told(entry["overall"].get(metric)) for name, entry in run.methods.items()}
    others = [f"{scores[name]} {WORDS[name]}" for name in WORDS if name in scores]
    listed = " and ".join([", ".join(others[:-1]), others[-1]]) if len(others) > 1 else "".join(others)
    personal = ", each client with its own adapter (mean)" if "own" in run.methods["federated"] else ""
    return f"Federated{personal}: test {word} {scores['federated']}" + (f", against {listed}" if listed else "")


def _done(run: Folder) -> int:
    return int(run.rounds[-1]["round"]) if run.rounds else 0


def _lead(run: Folder) -> list[str]:
    """Say what the tolds of the headline mean to each other."""
    if not run.methods:
        progress = [f"{LABELS.get(m, m)} {rows[-1]['round']}" for m, rows in run.journals.items() if rows]
        return [f"Rounds done: {', '.join(progress)}. The curves show what there is so far."] if progress else []
    score = {name: entry["overall"].get(run.metric) for name, entry in run.methods.items()}
    stopped = [f"Ended by {run.results['stopped']}."] if run.results.get("stopped") else []
    first, last, ours = score.get("untrained"), score.get("centralized"), score.get("federated")
    said = stopped
    if first is not None and last is not None and ours is not None and better(last, first, run.metric):
        said.append(_way((ours - first) / (last - first)))
    return said + _wins(run)


def _way(share: float) -> str:
    if share <= 0:
        return "Federated training did not improve on the untrained model."
    if share > 1:
        return "Federated training did better here than centralized training on all records."
    return f"That is {share:.0%} of the way from the untrained model to centralized training on all records."


def _wins(run: Folder) -> list[str]:
    """Compare, on each client's own test records, the federated adapter with the one it trains alone."""
    ours = run.methods["federated"].get("own") or run.methods["federated"]["groups"]
    alone = run.methods.get("local", {}).get("own", {})
    both = [(ours[name].get(run.metric), alone[name].get(run.metric)) for name in alone if name in ours]
    wins = [better(new, old, run.metric) for new, old in both if new is not None and old is not None]
    if not wins:
        return []
    return [
        f"On their own test records, {sum(wins)} of {len(wins)} clients do better with the federated adapter "
        "than with the one that they train alone."
    ]


def _name(value: Any) -> str:
    """Return the name of a job's choice, such as `fedavg` of {fedavg: {...}}."""
    return str(next(iter(value), NONE) if isinstance(value, Mapping) else value or NONE)


def _split(value: Any) -> str:
    """Return a split's name, and its column where it has one."""
    keys = next(iter(value.values()), None) if isinstance(value, Mapping) else None
    column = keys.get("column") if isinstance(keys, Mapping) else None
    return f"{_name(value)} {column}" if column else _name(value)


def _chips(job: Row, model: str) -> list[tuple[str, str]]:
    adapter = job.get("adapter")
    keys = next(iter(adapter.values()), None) if isinstance(adapter, Mapping) else None
    rank = f", rank {keys['rank']}" if isinstance(keys, Mapping) and "rank" in keys else ""
    return [
        ("Model", model),
        ("Adapter", _name(adapter) + rank),
        ("Task", _name(job.get("task"))),
        ("Split", _split(section(job, "data").get("split"))),
        ("Algorithm", _name(job.get("algorithm"))),
        ("Pipeline", ", ".join(map(_name, job.get("pipeline") or ())) or "none"),
        ("Seed", str(job.get("seed", NONE))),
    ]


def _ranking(run: Folder) -> str:
    found = [(name, entry["overall"].get(run.metric)) for name, entry in run.methods.items()]
    rows = [
        (LABELS[name], name, value) for name, value in found if isinstance(value, int | float) and math.isfinite(value)
    ]
    if len(rows) < 2:
        return ""
    title = f"Test {label(run.metric)}"
    alt = "; ".join(f"{name} {told(value)}" for name, _, value in rows)
    return charts.ranking(Frame("ranking", title, f"{title}. {alt}."), rows, told)


def _cards(run: Folder) -> list[Sequence[str]]:
    rows, clients = run.rounds, len(run.split.get("clients", {}))
    per_round = section(run.job, "clients").get("per_round") or clients
    base, planned = run.results.get("adapter", run.base), run.job.get("rounds")
    peak = max((row.get("peak_memory_mb") or 0 for found in run.journals.values() for row in found), default=0)
    share = f"{base['trainable'] / base['total']:.2%} of {base['total']:,}" if base.get("total") else ""
    return [
        (
            "Clients",
            f"{clients:,}",
            "all in each round" if per_round == clients else f"{per_round:,} in each round",
        ),
        ("Rounds", f"{_done(run):,}", "all done" if _done(run) == planned else f"of {planned}"),
        ("Trainable parameters", f"{base['trainable']:,}" if base else NONE, share),
        *_traffic_cards(rows),
        ("Peak memory", memory(peak) if peak else NONE, "of the whole process"),
        *_error_card(rows),
        *_secure_card(run, rows),
    ]


def _secure_card(run: Folder, rows: Sequence[Row]) -> list[Sequence[str]]:
    """Say among how many a client's update is hidden; and that in one process nothing is hidden from who runs it."""
    hidden = [row["secure"] for row in rows if row.get("secure")]
    if not hidden:
        return []
    least = min(hidden, key=lambda row: row["hidden_among"])
    where = "simulated in one process; " if section(run.results, "secure").get("simulated", True) else ""
    said = f"{where}where up to {least['colluders']} clients collude with the server"
    return [("Secure aggregation", f"each update hidden among {least['hidden_among']}", said)]


def _traffic_cards(rows: Sequence[Row]) -> list[Sequence[str]]:
    up, down = total(rows, "bytes_up"), total(rows, "bytes_down")
    orders = sum(len(row.get("clients", {})) for row in rows) or 1
    training, measuring = seconds(rows, "round"), seconds(rows, "evaluation")
    return [
        (
            "Per client and round",
            size((up + down) / orders),
            f"{size(up / orders)} up, {size(down / orders)} down",
        ),
        ("Total traffic", size(up + down), f"{size(up)} up, {size(down)} down"),
        ("Time", period(training + measuring), f"rounds {period(training)}, evaluation {period(measuring)}"),
    ]


def _error_card(rows: Sequence[Row]) -> list[Sequence[str]]:
    errors = [row["aggregation_error"] for row in rows if row.get("aggregation_error") is not None]
    return [("Aggregation error", told(errors[-1]), "relative, in the last round")] if errors else []
