"""The report's sections on rounds: curves, and what the rounds cost."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from weft.report import charts
from weft.report.charts import Frame, Points, Series
from weft.report.folder import LABELS, MOST_ROWS, Folder, Row, label, seconds, section, total
from weft.report.markup import NONE, Chart, dot, grid, memory, number, period, says, size, table

SUMMED = "The weighted mean, which was summed inside the ring: no client tells its own."
THIN = 30  # up to so many clients each have a line
ERROR = (
    "How far the new weights' change is from the weighted mean of the clients' changes: "
    "|dW_agg - sum p_i dW_i| / |sum p_i dW_i|."
)
MEAN = "One thin line for each client that took part; the thick one is their mean, weighted as the update is."
BAND = f"More than {THIN} clients: a band holds the middle 80 % of them, the line is their weighted mean."


# --- curves


def curves(run: Folder) -> str:
    """Return what changes from round to round."""
    found = [_test_chart(run, "loss"), _test_chart(run, "accuracy"), _train_chart(run), _error_chart(run)]
    drawn = [chart for chart in found if chart]
    note = ""
    if run.rounds and not _errors(run):
        note = says("The aggregation error is not measured for this method: its updates are no products of factors.")
    return (grid(drawn) or says("No round is done yet.")) + note + _rounds_table(run)


def _test_chart(run: Folder, metric: str) -> Chart | None:
    lines = [(method, run.test_curve(method, metric)) for method in ("federated", "centralized")]
    series = [Series(LABELS[method], method, points) for method, points in lines if points]
    if not series:
        return None
    finals = {method: entry["overall"].get(metric) for method, entry in run.methods.items()}
    levels = [(LABELS[method], method, finals.get(method)) for method in ("untrained", "local")]
    if "own" in run.methods.get("federated", {}):
        levels.append(("Federated, own adapters (mean)", "own", finals["federated"]))
    series += [Series(name, role, [(0, v)], "level") for name, role, v in levels if v is not None]
    never = section(run.job, "evaluate").get("every") == 0
    note = "Measured before the first round and after the last (evaluate.every: 0)." if never else ""
    title = f"Test {label(metric)}"
    frame = Frame(f"test-{metric}", title, f"{title}. {_told(series)}", note)
    return frame, partial(charts.lines, series=series, unit=number)


def _told(series: Iterable[Series]) -> str:
    """Say a chart in words, for those who cannot see it."""
    said = []
    for one in series:
        first, last = one.points[0], one.points[-1]
        path = number(last[1]) if one.kind == "level" else f"{number(first[1])} to {number(last[1])}"
        said.append(f"{one.label}: {path}")
    return "; ".join(said) + "."


def _losses(row: Row) -> dict[str, Row]:
    """Return the clients of a round that told their training loss."""
    clients = row.get("clients", {})
    return {name: client for name, client in clients.items() if isinstance(client.get("loss"), int | float)}


def _weighted_mean(clients: Iterable[Row]) -> float:
    weighed = [(client.get("weight") or 1, client["loss"]) for client in clients]
    mean: float = sum(weight * loss for weight, loss in weighed) / sum(weight for weight, _ in weighed)
    return mean


def _summed_chart(run: Folder) -> Chart | None:
    """Draw the loss that was summed inside the round, where no client tells its own."""
    points = [(row["round"], row["train_loss"]) for row in run.rounds if row.get("train_loss") is not None]
    if not points:
        return None
    middle = Series("Weighted mean", "federated", points)
    alt = f"Training loss by round. {_told([middle])}"
    frame = Frame("train-loss", "Training loss of the clients", alt, SUMMED)
    return frame, partial(charts.lines, series=[middle], unit=number)


def _train_chart(run: Folder) -> Chart | None:
    rows = [(row["round"], _losses(row)) for row in run.rounds if _losses(row)]
    if not rows:
        return _summed_chart(run)
    middle = Series("Weighted mean", "federated", [(n, _weighted_mean(told.values())) for n, told in rows])
    paths: dict[str, list[tuple[float, float]]] = {}
    for place, told in rows:
        for name, client in told.items():
            paths.setdefault(name, []).append((place, client["loss"]))
    many = len(paths) > THIN
    alt = f"Training loss by round. {_told([middle])}"
    frame = Frame("train-loss", "Training loss of the clients", alt, BAND if many else MEAN)
    if many:
        low, high = (_quantile(rows, share) for share in (0.1, 0.9))
        return frame, partial(charts.band, middle=middle, low=low, high=high, unit=number)
    thin = [Series("One client", "muted", path, "thin") for path in paths.values()]
    return frame, partial(charts.lines, series=[*thin, middle], unit=number)


def _quantile(rows: Iterable[tuple[int, dict[str, Row]]], share: float) -> Points:
    ordered = [(place, sorted(client["loss"] for client in told.values())) for place, told in rows]
    return [(place, losses[round(share * (len(losses) - 1))]) for place, losses in ordered]


def _errors(run: Folder) -> Points:
    found = ((row["round"], row.get("aggregation_error")) for row in run.rounds)
    return [(place, value) for place, value in found if value is not None]


def _error_chart(run: Folder) -> Chart | None:
    points = _errors(run)
    if not points:
        return None
    line = [Series("Aggregation error", "federated", points)]
    frame = Frame("error", "Aggregation error", f"Aggregation error by round. {_told(line)}", ERROR)
    return frame, partial(charts.lines, series=line, unit=number, log=all(value > 0 for _, value in points))


def _rounds_table(run: Folder) -> str:
    """Return who was asked, who was counted, and how far apart the counted ones were."""
    heads = ["Round", "Asked", "Counted", "Dropped", "Asked again", "Aggregation error", "Drift", "Cosine"]
    told = [row for row in run.rounds if "cohort" in row]
    clock = any("virtual_seconds" in row for row in told)
    rows = [[*_round(row), *(_clock(row) if clock else ())] for row in told]
    heads += ["Update norm", *(("Virtual time", "Staleness") if clock else ())]
    return (
        table("Rounds: who was counted, and what their updates did", heads, rows, name="rounds-table") if rows else ""
    )


def _clock(row: Row) -> list[Any]:
    return [f"{number(row.get('virtual_seconds'))} s", number(row.get("staleness"))]


def _round(row: Row) -> list[Any]:
    norms = [client["update_norm"] for client in row["clients"].values() if client.get("update_norm") is not None]
    span = f"{number(min(norms))} to {number(max(norms))}" if norms else NONE
    counts = [len(row["cohort"]), len(row["clients"]), len(row.get("dropped", {})), len(row.get("asked_again", {}))]
    measured = [number(row.get(key)) for key in ("aggregation_error", "drift", "cosine")]
    return [f"{row['round']:,}", *(f"{count:,}" for count in counts), *measured, span]


# --- traffic


def traffic(run: Folder) -> str:
    """Return bytes, seconds and memory, by round, by method and by client."""
    rows = run.rounds
    if not rows:
        return says("No round is done yet.")
    sent = [
        Series(name, role, [(row["round"], row.get(key) or 0) for row in rows])
        for name, role, key in (("Up", "first", "bytes_up"), ("Down", "second", "bytes_down"))
    ]
    spent = [
        Series(name, role, [(row["round"], seconds([row], phase)) for row in rows])
        for name, role, phase in (("Training", "first", "round"), ("Evaluation", "second", "evaluation"))
    ]
    drawn = [
        _columns_chart("bytes", "Bytes in each round", sent, size),
        _columns_chart("traffic", "Bytes so far", [_so_far(one) for one in sent], size),
        _columns_chart("seconds", "Time of each round", spent, lambda value: f"{value:,.4g} s"),
        _memory_chart(rows),
    ]
    return grid([chart for chart in drawn if chart]) + _methods_cost(run) + _clients_table(run)


def _columns_chart(name: str, title: str, parts: Sequence[Series], unit: charts.Unit) -> Chart:
    told = "; ".join(f"{part.label}: {unit(part.points[-1][1])}" for part in parts)
    frame = Frame(name, title, f"{title}. In the last round, {told}.")
    return frame, partial(charts.columns, parts=parts, unit=unit)


def _so_far(series: Series) -> Series:
    rounds, values = zip(*series.points, strict=True)
    return Series(series.label, series.role, list(zip(rounds, accumulate(values), strict=True)))


def _memory_chart(rows: Sequence[Row]) -> Chart | None:
    points = [(row["round"], row["peak_memory_mb"]) for row in rows if row.get("peak_memory_mb")]
    if not points:
        return None
    title, first, last = "Peak memory of the process", memory(points[0][1]), memory(points[-1][1])
    frame = Frame("memory", title, f"{title}: {first} after the first round, {last} after the last.")
    return frame, partial(charts.columns, parts=[Series("Peak memory", "first", points)], unit=memory)


def _methods_cost(run: Folder) -> str:
    rows = []
    for method, found in run.journals.items():
        sent = [size(total(found, key)) if method == "federated" else NONE for key in ("bytes_up", "bytes_down")]
        spent = [_spent(seconds(found, phase)) for phase in ("round", "evaluation")]
        last = found[-1]["round"] if found else 0
        rows.append([dot(LABELS.get(method, method).removesuffix(" (mean)"), method), f"{last:,}", *sent, *spent])
    heads = ["Method", "Rounds", "Bytes up", "Bytes down", "Training", "Evaluation"]
    return table("Cost of each method", heads, rows) if len(rows) > 1 else ""


def _spent(duration: float) -> str:
    return period(duration) if duration >= 0.005 else NONE


def _clients_table(run: Folder) -> str:
    taken: dict[str, list[Row]] = {name: [] for name in run.split.get("clients", {})}
    for row in run.rounds:
        for name, client in row.get("clients", {}).items():
            taken.setdefault(name, []).append(client)
    heads = ["Client", "Records", "Cut", "Rounds", "Dropped", "Up / round", "Down / round", "Traffic", "Training"]
    heads += ["Update norm", "First loss", "Last loss"]
    shown, title = list(taken), "Clients: records, and what the federated rounds cost"
    if len(taken) > MOST_ROWS:
        shown = sorted(taken, key=lambda name: -len(taken[name]))[:MOST_ROWS]
        title += (
            f"; the {MOST_ROWS:,} of {len(taken):,} that were asked most often, journal.jsonl and split.json hold all"
        )
    rows = [_client(run, name, taken[name]) for name in shown]
    return table(title, heads, rows, name="clients-table")


def _client(run: Folder, name: str, rows: Sequence[Row]) -> list[Any]:
    held, rounds = run.split.get("clients", {}).get(name, {}), len(rows) or 1
    up, down = total(rows, "bytes_up"), total(rows, "bytes_down")
    losses = [number(row.get("loss"), 3) for row in (*rows[:1], *rows[-1:])] or [NONE, NONE]
    counts = [f"{held[key]:,}" if key in held else NONE for key in ("size", "truncated")]
    sent = [size(up / rounds), size(down / rounds), size(up + down)]
    lost = sum(name in row.get("dropped", {}) for row in run.rounds)
    norm = number(rows[-1].get("update_norm")) if rows else NONE
    return [name, *counts, f"{len(rows):,}", f"{lost:,}", *sent, period(total(rows, "seconds")), norm, *losses]
