"""Pieces of the report's page: numbers as people read them, tables, lists; all but Html is escaped."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from weft.report.charts import Frame

Chart = tuple[Frame, Callable[[Frame], str]]
NONE = "–"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def number(value: Any, places: int | None = None) -> str:
    """Write a number with three digits, or with so many decimals.

    >>> number(2.5943), number(0.71234, 4), number(None), number(3.2e9, 2)
    ('2.59', '0.7123', '–', '3.2e+09')
    """
    if not isinstance(value, int | float):
        return NONE
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if places is None or abs(value) >= 1e6 else f"{value:,.{places}f}"


def told(value: Any) -> str:
    """Write a number in a sentence: always three digits.

    >>> told(3.9), told(0.0259), told(120)
    ('3.90', '0.0259', '120')
    """
    finite = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:#.3g}".rstrip(".") if finite else number(value)


def exact(value: Any, places: int, *, best: bool = False) -> Html:
    """Return a table's number: rounded for the eye, whole for a program."""
    if not isinstance(value, int | float):
        return Html(NONE)
    text = f'<data value="{value!r}">{number(value, places)}</data>'
    return Html(f'<span class="best">{text}<span class="hidden"> best</span></span>' if best else text)


def places(values: Iterable[Any]) -> int:
    """Return the decimals that suit a column of numbers."""
    largest = max((abs(v) for v in values if isinstance(v, int | float) and math.isfinite(v)), default=0)
    return 6 if largest < 0.01 else 4 if largest <= 1 else 3 if largest < 10 else 2


def size(value: float) -> str:
    """Write bytes for people.

    >>> size(379_880), size(12), size(999_700)
    ('380 kB', '12 B', '1 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def memory(mebibytes: float) -> str:
    """Write an amount of memory."""
    return f"{mebibytes:,.0f} MiB" if mebibytes < 10_000 else f"{mebibytes / 1024:,.1f} GiB"


def period(seconds: float) -> str:
    """Write a duration.

    >>> period(0.25), period(75), period(7_260)
    ('0.25 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def text(value: Any) -> str:
    """Escape what is not markup."""
    return value if isinstance(value, Html) else escape(str(value))


def says(*sentences: Any) -> str:
    """Return a paragraph; nothing where there is no sentence."""
    return f'<p class="say">{" ".join(map(text, sentences))}</p>' if sentences else ""


def pairs(rows: Iterable[Sequence[Any]]) -> str:
    """Return the items of a description list from rows of (name, value) or (name, value, more)."""
    marks = ("dt", "dd", 'dd class="more"')
    items = ([f"<{m}>{text(v)}</{m[:2]}>" for m, v in zip(marks, row, strict=False)] for row in rows)
    return "".join(f"<div>{''.join(item)}</div>" for item in items)


def _row(cells: Sequence[Any]) -> str:
    return f'<tr><th scope="row">{text(cells[0])}</th>{"".join(f"<td>{text(c)}</td>" for c in cells[1:])}</tr>'


def table(
    caption: str, head: Sequence[Any], rows: Iterable[Sequence[Any]], foot: Sequence[Any] = (), name: str = ""
) -> str:
    """Return a table that scrolls in its own box; the first cell of each row heads it."""
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    last = f"<tfoot>{_row(foot)}</tfoot>" if foot else ""
    given = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table{given}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(map(_row, rows))}</tbody>{last}</table></div>"
    )


def facts(found: Mapping[str, Any]) -> str:
    """Return a table of two columns without heads."""
    rows = "".join(_row((name, value)) for name, value in found.items())
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def grid(found: Sequence[Chart]) -> str:
    """Return charts in two columns; of an odd number the first takes both, so that no place stays empty."""
    drawn = [draw(replace(frame, wide=len(found) % 2 == 1 and not i)) for i, (frame, draw) in enumerate(found)]
    return f'<div class="charts">{"".join(drawn)}</div>' if found else ""


def items(rows: Sequence[str]) -> str:
    """Return a list."""
    return f"<ul>{''.join(f'<li>{text(row)}</li>' for row in rows)}</ul>"


def dot(name: str, role: str) -> Html:
    """Return a name beside the colour of its charts."""
    return Html(f'<span class="named"><span class="dot" style="background:var(--{role})"></span>{text(name)}</span>')
