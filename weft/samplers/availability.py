"""availability: only clients that are there can be asked, by periodic windows or by a recorded trace.

Uniformly without replacement among those that are there in a round, all of them where they are fewer than
`clients.per_round`; a round with nobody there changes nothing, and its line in the journal says so. Clients that are
seldom there count less over a run: the result leans to the others, as it does where real clients come and go.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import Field

from weft.core.errors import JobError
from weft.core.sampling import Member, Pool, Sampler
from weft.core.types import Facts

Rounds = Annotated[int, Field(ge=0)]
Window = tuple[Annotated[int, Field(gt=0)], Rounds, Annotated[int, Field(gt=0)]]
Trace = Mapping[str, list[tuple[int, int]]]
"""Client -> (first, last) rounds in which it is there, both counted."""


def availability(windows: dict[str, Window] | None = None, trace: str | None = None) -> Sampler:
    """Draw among the clients that are there.

    windows: client name or pattern -> [period, offset, length] in rounds: there in the rounds t with
    (t - 1 - offset) mod period < length; of several patterns the last, and clients of none are always there.
    trace: a CSV file with the columns client, first, last, a line for each stretch of rounds; clients that it does
    not name are never there.
    """
    patterns = windows or {}

    def check(facts: Facts, members: Mapping[str, Member]) -> None:
        if (trace is None) == (windows is None):
            raise JobError("availability needs windows or a trace, one of the two")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in members):
                raise JobError(f"availability: the window of `{pattern}` matches no client")

    def by_window(pool: Pool) -> list[str]:
        return _among(pool, lambda name: _in_window(patterns, name, pool.round))

    def opened(folder: Path) -> Sampler:
        assert trace is not None
        found = _read(folder / trace)

        def by_trace(pool: Pool) -> list[str]:
            return _among(pool, lambda name: any(a <= pool.round <= b for a, b in found.get(name, [])))

        def known(facts: Facts, members: Mapping[str, Member]) -> None:
            check(facts, members)
            if strangers := sorted(found.keys() - members.keys()):
                raise JobError(f"availability: {trace} names {strangers[0]}, which is no client of this split")

        return replace(plain, draw=by_trace, check=known, open=None)

    plain = Sampler(by_window, check=check, fixed=False, open=opened if trace else None)
    return plain


def _among(pool: Pool, there: Callable[[str], bool]) -> list[str]:
    return [name for name in pool.shuffled("cohort") if there(name)][: pool.count]


def _in_window(windows: Mapping[str, Window], name: str, number: int) -> bool:
    own = [window for pattern, window in windows.items() if fnmatchcase(name, pattern)]
    if not own:
        return True
    period, offset, length = own[-1]
    return (number - 1 - offset) % period < length


def _read(path: Path) -> Trace:
    """Read a trace; raise JobError for a line that is none."""
    try:
        with path.open(encoding="utf8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"availability: the trace {path.name} cannot be read: {error}") from None
    found: dict[str, list[tuple[int, int]]] = {}
    for line, row in enumerate(rows, start=2):
        try:
            first, last = int(row["first"]), int(row["last"])
            found.setdefault(row["client"], []).append((first, last))
        except (KeyError, TypeError, ValueError):
            raise JobError(
                f"{path.name}:{line}: a line of a trace has the columns client, first and last, the last two whole "
                "numbers of rounds"
            ) from None
    return found
