"""Charts for a page: plain numbers -> one HTML figure with an inline SVG, in colours that its CSS decides."""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, SymmetricalLogLocator

Unit = Callable[[float], str]
Points = Sequence[tuple[float, float]]

# matplotlib knows no CSS variables: it draws in these marks, which become var(--name) in the SVG.
KINDS = tuple(f"kind{number}" for number in range(1, 9))  # colours of things that have no colour of their own
ROLES = ("ink", "muted", "grid", "untrained", "local", "own", "centralized", "federated", "first", "second", *KINDS)
MARKS = {name: f"#0f1e{number:02x}" for number, name in enumerate(ROLES, start=16)}
DASHES: dict[str, tuple[float, ...]] = {
    "untrained": (1.2, 2.4),
    "local": (6, 2, 1.2, 2),
    "own": (3, 1.6),
    "centralized": (7, 2.6),
}

HALF, WIDE, SIDE = 440, 720, 360  # widths in points; the page scales them to its columns
ROW = 7.5  # height of one bar in points
ALONE = 16  # height of a bar that has its row to itself
DOTS = 40  # lines with up to so many points show each of them
BARS = 60  # columns with up to so many rounds have gaps between them

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from data: a "$" in one is no formula
    "axes.unicode_minus": False,
    "font.family": "DejaVu Sans",  # ships with matplotlib: every machine lays out alike; CSS shows another
    "font.size": 9.5,
    "text.color": MARKS["ink"],
    "axes.labelcolor": MARKS["muted"],
    "axes.edgecolor": MARKS["grid"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": MARKS["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": MARKS["muted"],
    "ytick.color": MARKS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Frame:
    """What stands around a chart: `name` is unique on the page, `alt` says in words what is drawn."""

    name: str
    title: str
    alt: str
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars: `role` names its colour."""

    label: str
    role: str
    points: Points
    kind: Literal["line", "thin", "level"] = "line"


# --- from a figure to HTML


def _canvas(frame: Frame, height: float, width: float = HALF) -> tuple[Figure, Axes]:
    figure = Figure(figsize=((WIDE if frame.wide else width) / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, frame: Frame) -> str:
    """Return the figure as an SVG element that can stand beside others: own ids, no style sheet."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": frame.name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that DejaVu lacks is the browser's to find
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: _own(tag.group(), frame.name), text)
    label = f'<svg role="img" aria-label="{escape(frame.alt)}"'
    return re.sub(r"\n\s*\n", "\n", text).replace("<svg", label, 1).strip()


def _own(tag: str, name: str) -> str:
    """Rename a tag's ids, and turn marks into CSS variables; text between tags is left alone."""
    tag = re.sub(r' (width|height)="[\d.]+pt"| xmlns(:xlink)?="[^"]*"| version="1.1"', "", tag)
    tag = tag.replace("xlink:href", "href").replace('id="', f'id="{name}-')
    tag = tag.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return re.sub("|".join(MARKS.values()), lambda mark: f"var(--{_ROLE_OF[mark.group()]})", tag)


_ROLE_OF = {mark: role for role, mark in MARKS.items()}


def _figure(figure: Figure, frame: Frame, keys: Sequence[str] = ()) -> str:
    note = f"<p>{escape(frame.note)}</p>" if frame.note else ""
    legend = f'<p class="keys">{"".join(keys)}</p>' if len(keys) > 1 else ""
    wide = " wide" if frame.wide else ""
    return (
        f'<figure class="chart{wide}"><figcaption><h3>{escape(frame.title)}</h3>{note}'
        f'{legend}</figcaption><div class="canvas">{_svg(figure, frame)}</div></figure>'
    )


def _key(label: str, role: str, *, line: bool = False, thin: bool = False) -> str:
    dashes = " ".join(f"{length * 1.6:g}" for length in DASHES.get(role, ()))
    stroke = f'stroke-width="{1 if thin else 2.4}" stroke-dasharray="{dashes or "none"}"'
    shape = f'<path d="M1 5H23" {stroke} style="stroke:var(--{role})"/>'
    if not line:
        shape = f'<rect x="9" y="0" width="10" height="10" rx="2.5" style="fill:var(--{role})"/>'
    return f'<span><svg viewBox="0 0 24 10" aria-hidden="true">{shape}</svg>{escape(label)}</span>'


# --- charts


def lines(
    frame: Frame, series: Sequence[Series], unit: Unit, *, log: bool = False, over: tuple[str, Unit] | None = None
) -> str:
    """Draw values over rounds; a level is a line across, thin lines are many of one kind.

    over: what lies along the bottom instead of rounds, with its unit.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(frame, 280 if frame.wide else 235)
        for one in series:
            _line(axes, one)
        if log:
            _logarithmic(axes, [y for one in series for _, y in one.points])
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(lambda value, _: unit(value))
        if over:
            _along(axes, *over)
        else:
            _rounds(axes)
        labels = {one.label: one for one in series}
        keys = [_key(name, one.role, line=True, thin=one.kind == "thin") for name, one in labels.items()]
        return _figure(figure, frame, keys)


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    spread = max(finite) / min(finite)
    axes.set_yscale("log")
    if spread < 10:  # too narrow for powers of ten
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 300 else (1,), numticks=8))
    axes.minorticks_off()


def _line(axes: Axes, series: Series) -> None:
    look: dict[str, Any] = {"color": MARKS[series.role], "linewidth": 2}
    if series.role in DASHES:
        look["linestyle"] = (0, DASHES[series.role])
    if series.kind == "level":
        axes.axhline(series.points[0][1], **look)
        return
    few = len(series.points) <= DOTS
    look |= {"marker": "o", "markersize": 4.5} if few else {}
    if series.kind == "thin":
        look |= {
            "linewidth": 0.8,
            "alpha": 0.6,
            "marker": "o" if len(series.points) == 1 else None,
            "markersize": 3,
        }
    axes.plot([x for x, _ in series.points], [_finite(y) for _, y in series.points], **look)


def band(
    frame: Frame, middle: Series, low: Points, high: Points, unit: Unit, label: str = "middle 80 % of clients"
) -> str:
    """Draw one line over rounds within a band: for more lines than an eye can follow."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(frame, 280 if frame.wide else 235)
        bottom, top = [y for _, y in low], [y for _, y in high]
        axes.fill_between([x for x, _ in low], bottom, top, color=MARKS["untrained"], alpha=0.35, linewidth=0)
        _line(axes, middle)
        axes.yaxis.set_major_formatter(lambda value, _: unit(value))
        _rounds(axes)
        return _figure(figure, frame, [_key(middle.label, middle.role, line=True), _key(label, "untrained")])


def _rounds(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.grid(visible=False, axis="x")


def _along(axes: Axes, label: str, unit: Unit) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: unit(value))
    axes.set_xlabel(label)


@dataclass(frozen=True)
class Dot:
    """One thing with two measures; `spread` is how far the second one varies, up and down."""

    label: str
    role: str
    x: float
    y: float
    spread: float = 0.0


def dots(frame: Frame, found: Sequence[Dot], over: tuple[str, Unit], unit: Unit) -> str:
    """Draw one dot for each thing, with its spread, where a larger x may be thousands of times a smaller."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(frame, 300 if frame.wide else 235)
        wide = max(dot.x for dot in found) / 60
        for place, dot in enumerate(found):
            aside = wide * sum(abs(other.x - dot.x) <= wide / 2 for other in found[:place])  # else one hides another
            look: Any = {"fmt": "o", "color": MARKS[dot.role], "markersize": 8, "capsize": 4, "linewidth": 1.6}
            axes.errorbar(dot.x + aside, dot.y, dot.spread or None, **look)
        xs = [dot.x for dot in found if dot.x > 0] or [1.0]
        axes.yaxis.set_major_formatter(lambda value, _: unit(value))
        if max(xs) > 20 * min(xs):
            axes.set_xscale("symlog", linthresh=min(xs))
        _along(axes, *over)
        if max(xs) > 20 * min(xs):
            axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=min(xs), subs=(1, 3)))
            axes.minorticks_off()
        axes.margins(x=0.08, y=0.15)
        return _figure(figure, frame, [_key(dot.label, dot.role) for dot in found])


def spreads(frame: Frame, rows: Sequence[tuple[str, str, Sequence[float]]], unit: Unit) -> str:
    """Draw for each (label, role, values) a dot a value on a line from the lowest to the highest."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(frame, 40 + 26 * len(rows))
        for place, (_, role, values) in enumerate(rows):
            known = [value for value in values if math.isfinite(value)] or [math.nan]
            axes.plot([min(known), max(known)], [place, place], color=MARKS[role], linewidth=1.4, alpha=0.55)
            axes.plot(known, [place] * len(known), "o", color=MARKS[role], markersize=6, alpha=0.75)
        axes.xaxis.set_major_formatter(lambda value, _: unit(value))
        _names(axes, [label for label, _, _ in rows])
        return _figure(figure, frame)


def columns(frame: Frame, parts: Sequence[Series], unit: Unit) -> str:
    """Draw parts of a whole, one on the other, for each round."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(frame, 280 if frame.wide else 235)
        floor = [0.0] * len(parts[0].points)
        width = 0.72 if len(floor) <= BARS else 1.0
        for part in parts:
            rounds, values = [x for x, _ in part.points], [y for _, y in part.points]
            top = [low + value for low, value in zip(floor, values, strict=True)]
            if len(floor) <= BARS:
                axes.bar(rounds, values, width, floor, color=MARKS[part.role])
            else:  # one shape, however many rounds
                axes.fill_between(rounds, floor, top, step="mid", color=MARKS[part.role], linewidth=0)
            floor = top
        axes.set_ylim(0, 1.06 * max(floor) or 1)
        axes.yaxis.set_major_formatter(lambda value, _: unit(value))
        _rounds(axes)
        return _figure(figure, frame, [_key(part.label, part.role) for part in parts])


def bars(frame: Frame, rows: Sequence[str], groups: Mapping[str, tuple[str, Sequence[float]]], unit: Unit) -> str:
    """Draw horizontal bars: `groups` is label -> (role, a value for each row; NaN where there is none)."""
    count = len(groups)
    thick = ROW if count > 1 else ALONE
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(frame, 34 + len(rows) * (count * thick + 11))
        share = thick / (count * thick + 11)
        for place, (role, values) in enumerate(groups.values()):
            heights = [row + (place - (count - 1) / 2) * share for row in range(len(rows))]
            axes.barh(heights, [_finite(value) for value in values], share * 0.86, color=MARKS[role])
        axes.xaxis.set_major_formatter(lambda value, _: unit(value))
        _names(axes, rows)
        return _figure(figure, frame, [_key(label, role) for label, (role, _) in groups.items()])


def _names(axes: Axes, rows: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), [short(row) for row in rows])
    axes.tick_params("y", labelcolor=MARKS["ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def ranking(frame: Frame, rows: Sequence[tuple[str, str, float]], unit: Unit) -> str:
    """Draw one bar with its value for each (label, role, value)."""
    with mpl.rc_context(STYLE | {"font.size": 11, "axes.grid": False}):
        figure, axes = _canvas(frame, 14 + 30 * len(rows), SIDE)
        values = [_finite(value) for _, _, value in rows]
        drawn = axes.barh(range(len(rows)), values, 0.56, color=[MARKS[role] for _, role, _ in rows])
        axes.bar_label(drawn, [unit(value) for value in values], padding=5, fontweight="bold")
        axes.margins(x=0.2)
        _names(axes, [label for label, _, _ in rows])
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        return _figure(figure, frame)


def heat(
    frame: Frame,
    rows: Sequence[str],
    classes: Sequence[str],
    counts: Sequence[Sequence[int]],
    sums: Sequence[int],
) -> str:
    """Draw counts (rows, classes) as squares, each row shaded by its shares, beside bars of its size."""
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        longest = max(len(short(name)) for name in classes)
        figure = Figure(figsize=(WIDE / 72, (60 + 17 * len(rows) + 4 * longest) / 72), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3.4, 1])
        _squares(left, counts)
        left.set_xticks(range(len(classes)), [short(name) for name in classes], rotation=40, ha="right")
        left.tick_params("x", rotation_mode="anchor")
        left.set_xlim(-0.5, len(classes) - 0.5)
        drawn = right.barh(range(len(rows)), sums, 0.6, color=MARKS["first"])
        right.bar_label(drawn, [f"{value:,}" for value in sums], padding=4, color=MARKS["muted"], fontsize=8.5)
        right.margins(x=0.28)
        right.xaxis.set_visible(False)
        right.tick_params("y", left=False, labelleft=False)
        right.set_title("training records", loc="left", fontsize=9, color=MARKS["muted"])
        for axes in (left, right):
            axes.spines["bottom"].set_visible(False)
        _names(left, rows)
        return _figure(figure, frame)


def _squares(axes: Axes, counts: Sequence[Sequence[int]]) -> None:
    tell = len(counts[0]) <= 16
    for row, values in enumerate(counts):
        total = sum(values) or 1
        for column, value in enumerate(values):
            corner = (column - 0.46, row - 0.43)
            color = (MARKS["first"], 0.12 + 0.55 * value / total) if value else (MARKS["grid"], 0.45)
            axes.add_patch(Rectangle(corner, 0.92, 0.86, facecolor=color, linewidth=0))
            if tell and value:
                axes.text(column, row, f"{value:,}", ha="center", va="center", fontsize=8)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def short(text: str, longest: int = 26) -> str:
    """Cut a name in its middle, as its ends tell names apart.

    >>> short("a-hospital-with-a-very-long-name-07", 12)
    'a-hosp…me-07'
    """
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[1 - half :]}"
