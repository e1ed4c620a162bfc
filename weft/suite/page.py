"""The leaderboard as one self-contained page: a sortable table, score against cost, clients, what is noise."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import weft.report
from weft.report import charts
from weft.report.charts import KINDS, Dot, Frame, Series
from weft.report.folder import METRICS, label
from weft.report.markup import NONE, facts, grid, items, number, pairs, period, says, size, told
from weft.suite.leaderboard import Leaderboard, plus_minus, significance
from weft.suite.rows import Row

MOST_DRAWN = len(KINDS)


def page(board: Leaderboard) -> str:
    """Return the whole page; it fetches nothing."""
    here, report = Path(__file__), Path(weft.report.__file__)
    template = Template(here.with_name("page.html").read_text(encoding="utf8"))
    styles = [file.with_name("page.css").read_text(encoding="utf8") for file in (report, here)]
    environment = [r.environment for row in board.rows for r in row.results.values()]
    return template.substitute(
        title=escape(f"Weft: {board.suite.path.stem}"),
        style="\n".join(styles),
        headline=escape(headline(board)),
        lead=says(*_lead(board)),
        chips=pairs(_chips(board)),
        ranking=_ranking(board),
        failures=_failures(board),
        table=table(board),
        significance=escape(significance(board)),
        cost=_cost(board),
        clients=_clients(board),
        suite=escape((board.folder / "suite.yaml").read_text(encoding="utf8")),
        environment=facts(environment[0] if environment else {}),
        script=here.with_name("page.js").read_text(encoding="utf8"),
    )


def _word(metric: str) -> str:
    return METRICS.get(metric, (metric, 0))[0]


def _ranked(board: Leaderboard) -> list[Row]:
    return [row for row in board.rows if board.rank(row) is not None]


def headline(board: Leaderboard) -> str:
    """Say the result in one sentence, and no more than the noise allows."""
    ranked = _ranked(board)
    if not ranked:
        return f"Not finished: {board.finished} of {len(board.suite.cells)} cells"
    first, others = ranked[0], ranked[1:]
    score = f"{first.name}: {_word(board.metric)} {plus_minus(first.mean(board.metric), first.deviation(board.metric))}"
    alike = [row.name for row in others if board.verdict(row) == "no clear difference"]
    if not others:
        return score
    if not alike:
        compared = all(row.name in board.apart for row in others)
        return f"{score}, the best of {len(ranked)}" + (", and by more than noise" if compared else "")
    which = "every other row" if len(alike) == len(others) else f"{len(alike)} of {len(others)} others"
    return f"{score}, the best of {len(ranked)}, with no clear difference to {which}"


def _lead(board: Leaderboard) -> list[str]:
    """Name the scores to compare with, as a range where variants each have their own."""
    words = {"untrained": "the untrained base", "local": "each client alone (mean)", "centralized": "centralized"}
    said = []
    for method, word in words.items():
        rows = [row for row in board.rows if row.method == method and row.results]
        values = sorted(value for row in rows if (value := row.mean(board.metric)) is not None)
        if values:
            said.append(f"{word} {' to '.join(dict.fromkeys(map(told, (values[0], values[-1]))))}")
    return [f"For comparison: {', '.join(said)}."] if said else []


def _chips(board: Leaderboard) -> list[tuple[str, str]]:
    seeds = board.suite.keys.seeds
    return [
        ("Suite", board.suite.path.stem),
        ("Ranked by", label(board.metric)),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Cells", f"{board.finished} of {len(board.suite.cells)}"),
    ]


def _ranking(board: Leaderboard) -> str:
    rows = [
        (row.name, "federated" if row.method == "federated" else row.method, value)
        for row in board.rows
        if (value := row.mean(board.metric)) is not None
    ]
    if len(rows) < 2:
        return ""
    title = f"Test {label(board.metric)}, mean of seeds"
    said = "; ".join(f"{name} {told(value)}" for name, _, value in rows)
    return charts.ranking(Frame("ranking", title, f"{title}. {said}."), rows[:14], told)


def _failures(board: Leaderboard) -> str:
    if not board.failures:
        return ""
    said = [f"{cell}: {reason}" for cell, reason in sorted(board.failures.items())]
    return f'<div class="note"><strong>Cells that failed</strong>{items(said)}</div>'


# --- the table


def table(board: Leaderboard) -> str:
    """Return the sortable table: a value to sort by in every cell, a text to read."""
    heads = _heads(board)
    shown = "".join(
        f'<th scope="col" aria-sort="none" data-first="{first}">{escape(name)}</th>' for name, first in heads
    )
    body = "".join(_line(board, row) for row in board.rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Leaderboard">'
        f'<table class="sortable"><thead><tr>{shown}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _heads(board: Leaderboard) -> list[tuple[str, str]]:
    """Return (head, which way the first click sorts)."""
    first, *others = [(_word(m), "down" if METRICS.get(m, ("", 1))[1] > 0 else "up") for m in _metrics(board)]
    groups = [("lowest client", "down"), ("highest client", "down")] if _grouped(board) else []
    cost = [("trained", "up"), ("up, client and round", "up"), ("down, client and round", "up"), ("bytes in all", "up")]
    return [
        ("rank", "up"),
        ("row", "up"),
        first,
        ("against the best", "up"),
        *others,
        *groups,
        *cost,
        ("seeds", "down"),
    ]


def _metrics(board: Leaderboard) -> list[str]:
    """Return the metrics, that of the ranking first."""
    return [board.metric, *[metric for metric in board.metrics if metric != board.metric]]


def _grouped(board: Leaderboard) -> bool:
    return any(len(row.of_groups(board.metric)) > 1 for row in board.rows)


def _line(board: Leaderboard, row: Row) -> str:
    groups = row.of_groups(board.metric)
    ends = [min(groups.values(), default=None), max(groups.values(), default=None)] if _grouped(board) else []
    first = next(iter(row.results.values()), None)
    rank = board.rank(row)
    score, *others = [_cell(row.mean(m), plus_minus(row.mean(m), row.deviation(m))) for m in _metrics(board)]
    cells = [
        _cell(rank, str(rank) if rank else NONE),
        _cell(row.name, row.name),
        score,
        _cell(board.verdict(row) if row.results else "no result", _against(board, row)),
        *others,
        *[_cell(value, number(value, 4)) for value in ends],
        *_costs(row, first),
        _cell(len(row.results), f"{len(row.results)} of {row.wanted}"),
    ]
    kind = "" if row.method == "federated" else ' class="reference"'
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _costs(row: Row, first: Any) -> list[str]:
    if first is None:
        return [_cell(None, NONE)] * 4
    if row.method == "centralized":  # its records travel, not its adapter
        sent: list[str] = [_cell(None, "its records")] * 3
    else:
        sent = [_cell(value, size(value)) for value in (first.up, first.down, first.total)]
    share = 100 * first.trainable / first.parameters
    return [_cell(share, f"{first.trainable:,} ({share:.3g} %)"), *sent]


def _against(board: Leaderboard, row: Row) -> str:
    if not row.results:
        return "no result"
    apart = board.apart.get(row.name)
    if apart is None:
        return board.verdict(row)
    return f"{board.verdict(row)}: {apart.low:+.3g} to {apart.high:+.3g}, p {board.corrected[row.name]:.2g}"


def _cell(value: Any, text: str) -> str:
    found = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    kind = ' class="text"' if isinstance(value, str) else ""
    shown = escape(text).replace(" ± ", ' <span class="pm">± ') + ("</span>" if " ± " in text else "")
    return f'<td{kind} data-value="{escape(found)}">{shown}</td>'


# --- charts


def _roles(board: Leaderboard) -> dict[str, str]:
    """Return row -> colour, of the best that there are colours for."""
    return {row.name: role for row, role in zip(_ranked(board), KINDS, strict=False)}


def _cost(board: Leaderboard) -> str:
    drawn = [row for row in _ranked(board) if row.name in _roles(board)]
    if not drawn:
        return says("Nothing is finished yet.")
    left = len(_ranked(board)) - len(drawn)
    more = f" The best {len(drawn)} rows are drawn; {left} more are in the table." if left else ""
    network = board.suite.keys.network
    said = (
        f"Bytes are measured: the length of what a client sent and received. Simulated time is, in each round, that of "
        f"its slowest client: the adapter comes at {network.down:g} Mbit/s, the client trains as fast as it did on "
        f"this machine, its update goes at {network.up:g} Mbit/s; clients work side by side, and the server takes no "
        f"time. Times differ from run to run; the tables hold none.{more}"
    )
    return says(said) + grid([_final(board, drawn), *_curves(board, drawn)])


def _final(board: Leaderboard, drawn: Sequence[Row]) -> Any:
    roles, metric = _roles(board), board.metric
    found = [
        Dot(
            row.name,
            roles[row.name],
            _first(row).up + _first(row).down,
            row.mean(metric) or 0,
            row.deviation(metric) or 0,
        )
        for row in drawn
    ]
    said = "; ".join(f"{dot.label}: {told(dot.y)} for {size(dot.x)}" for dot in found)
    frame = Frame(
        "final", f"Final {label(metric)}", f"Final {_word(metric)} over bytes a client and round. {said}.",
        "over bytes a client sends and receives in a round; bars: one standard deviation over seeds",
    )  # fmt: skip
    return frame, lambda frame: charts.dots(frame, found, ("bytes, client and round", size), told)


def _first(row: Row) -> Any:
    return next(iter(row.results.values()))


def _curves(board: Leaderboard, drawn: Sequence[Row]) -> list[Any]:
    metric = _measured(board, drawn)
    if not metric:
        return []
    ways: dict[str, tuple[str, str, Any]] = {
        "round": ("rounds", "round", lambda value: f"{value:g}"),
        "bytes": ("bytes", "bytes of one client, both ways", size),
        "seconds": ("simulated time", "simulated time", period),
    }
    return [_over(board, drawn, metric, way, told_of) for way, told_of in ways.items()]


def _measured(board: Leaderboard, drawn: Sequence[Row]) -> str:
    """Return what the rounds were evaluated by: the metric of the ranking where they were, else the loss."""
    found = [point.scores for row in drawn for point in _first(row).curve]
    if not found:
        return ""
    return board.metric if board.metric in found[0] else "loss"


def _over(board: Leaderboard, drawn: Sequence[Row], metric: str, way: str, words: tuple[str, str, Any]) -> Any:
    roles = _roles(board)
    series = [Series(row.name, roles[row.name], _averaged(row, metric, way)) for row in drawn]
    title, along, unit = words
    ends = "; ".join(f"{one.label} ends at {told(one.points[-1][1])}" for one in series if one.points)
    frame = Frame(f"over-{way}", f"Test {label(metric)} over {title}", f"{ends}.", "mean of seeds")
    return frame, lambda frame: charts.lines(frame, series, told, over=None if way == "round" else (along, unit))


def _averaged(row: Row, metric: str, way: str) -> list[tuple[float, float]]:
    """Return the curve of a row: both measures averaged over its seeds, evaluation by evaluation."""
    curves = [result.curve for result in row.results.values()]
    points = []
    for same in zip(*curves, strict=False):
        xs, ys = [getattr(point, way) for point in same], [point.scores.get(metric) for point in same]
        known = [y for y in ys if y is not None]
        if known:
            points.append((sum(xs) / len(xs), sum(known) / len(known)))
    return points


def _clients(board: Leaderboard) -> str:
    rows: list[tuple[str, str, Mapping[str, float]]] = [
        (row.name, "federated" if row.method == "federated" else row.method, row.of_groups(board.metric))
        for row in board.rows
        if row.results
    ]
    rows = [row for row in rows if len(row[2]) > 1]
    if not rows:
        return says("The test records are one group here: split by a column, or give one to them, to see each client.")
    title = f"Test {label(board.metric)} of each test group"
    said = "; ".join(f"{name}: {told(min(g.values()))} to {told(max(g.values()))}" for name, _, g in rows)
    frame = Frame("spread", title, f"{title}. {said}.", "mean of seeds; one dot a group", wide=True)
    return charts.spreads(frame, [(name, role, list(found.values())) for name, role, found in rows], told)
