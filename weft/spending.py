"""The privacy of a job: what a round spends, what all rounds will, and the ledger of what was.

The ledger is `privacy.jsonl` in the run folder, one line a round, on disk before the round's noise is drawn: a crash
can only count too much, and a resume starts from what stands there. A round that is done again with the same secret
from the same state releases the same bytes, so its line stands once; anything else is counted again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft import journal
from weft.core import trees
from weft.core.errors import RunError
from weft.core.round import Federation, sample
from weft.core.types import Server
from weft.files import write_safely
from weft.privacy import Epsilon, Spent, added, epsilon, worst

Row = dict[str, Any]
TABLE = 64  # unlike clients whose epsilon is computed for a table; of more, the worst alone


@dataclass(frozen=True)
class Level:
    """One promise: whose presence is hidden, from noise of what, under which conditions."""

    name: str
    """`record`: inside each client; `site`: of the whole update of a client, at the sum."""
    unit: str
    clip: float
    sampling: str
    spent: Mapping[str, Spent]
    """Client -> what a round that it is asked in spends."""
    conditions: tuple[str, ...] = ()
    shared: int = 1
    """Clients that one unit has records at, at most: their releases add up."""
    discrete: bool = False
    """The noise is whole numbers."""

    def epsilons(self, rows: Iterable[Row], delta: float) -> Row:
        """Return what the rounds of some ledger lines have spent: the worst client's, and each client's."""
        total: dict[str, list[Spent]] = {}
        for row in rows:
            for client, (noise, rate, steps) in row.get(self.name, {}).items():
                total.setdefault(client, []).append(Spent(noise, rate, steps * self.shared))
        every = {client: added(spent) for client, spent in sorted(total.items())}
        bad = max(
            ((epsilon(spent, delta, self.discrete), spent) for spent in worst(list(every.values()))),
            key=lambda pair: pair[0].value,
            default=(Epsilon(0.0, 0.0), ()),
        )
        table = every if len(set(every.values())) <= TABLE else {}
        return {
            **_told(*bad),
            "worst": next((client for client, spent in every.items() if spent == bad[1]), None),
            "clients": {name: _rounded(epsilon(spent, delta, self.discrete).value) for name, spent in table.items()},
        }


def _told(found: Epsilon, spent: Sequence[Spent]) -> Row:
    mechanisms = [{"noise": one.noise, "rate": _rounded(one.rate), "steps": one.steps} for one in spent]
    return {
        "epsilon": _rounded(found.value),
        "accountant": found.accountant,
        "pld": _rounded(found.pld),
        "rdp": _rounded(found.rdp),
        "mechanisms": mechanisms,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


@dataclass(frozen=True)
class Account:
    """What the rounds of a job spend."""

    levels: tuple[Level, ...]
    delta: float
    budget: float | None = None
    missing: tuple[str, ...] = ()
    """Why noise in the pipeline gives no epsilon."""

    def line(self, cohort: Iterable[str]) -> Row:
        """Return what a round spends that asks these clients, as it stands in the ledger."""
        names = sorted(cohort)
        return {
            level.name: {n: [s.noise, s.rate, s.steps] for n in names if (s := level.spent.get(n))}
            for level in self.levels
        }

    def statements(self, rows: Sequence[Row]) -> list[Row]:
        """Return each promise with all that it is worth nothing without."""
        return [
            {
                "level": level.name,
                "unit": level.unit,
                "delta": self.delta,
                **level.epsilons(rows, self.delta),
                "clip": level.clip,
                "sampling": level.sampling,
                "conditions": list(level.conditions),
            }
            for level in self.levels
        ]

    def forecast(self, federation: Federation, rounds: int) -> list[Row]:
        """Return the promises after all rounds; the cohorts are known, since they come from the public seed."""
        return self.statements([self.line(sample(federation, number)) for number in range(1, rounds + 1)])

    def spending(self, rows: Sequence[Row]) -> float:
        """Return the largest epsilon of all promises."""
        return max((level.epsilons(rows, self.delta)["epsilon"] for level in self.levels), default=0.0)


@dataclass
class Ledger:
    """The lines of one run."""

    path: Path
    account: Account
    secret: str | None = None
    """The name of the secret that the noise comes from."""
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = rows_of(self.path)

    def spend(self, server: Server, federation: Federation) -> str | None:
        """Write down what the next round spends, or say why it must not begin; nothing is noised before."""
        number = server.round + 1
        if lost := set(range(1, number)) - {row["round"] for row in self.rows}:
            raise RunError(f"{self.path}: the privacy ledger lacks round {min(lost)}, which was run; put it back there")
        line: Row = {"round": number, "secret": self.secret, "state": trees.digest(server.state)}
        line |= self.account.line(sample(federation, number))
        if self._again(line):
            return None
        budget, after = self.account.budget, self.account.spending([*self.rows, line])
        if budget is not None and after > budget:
            return (
                f"privacy.epsilon: with round {number} epsilon would be {after:.4g}, and {budget:g} is allowed; the "
                f"adapter is that of round {server.round}"
            )
        line["epsilon"] = after
        journal.append(self.path, line)
        self.rows.append(line)
        return None

    def _again(self, line: Row) -> bool:
        """Tell whether this very round stands here already: at the site the same secret gives the same bytes."""
        same = {key: value for key, value in line.items() if key != "site"}
        once = not line.get("site")
        return once and any(all(row.get(key) == value for key, value in same.items()) for row in self.rows)

    @property
    def epsilon(self) -> float | None:
        """Return what is spent so far."""
        return self.rows[-1]["epsilon"] if self.rows else None


def rows_of(path: Path) -> list[Row]:
    """Return a ledger's lines; raise RunError for one that is damaged, which may not be as if it were not there.

    A last line without its end is dropped, from the file too: its round never began.
    """
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for place, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "round" not in row:
            raise RunError(
                f"{path}, line {place}: the privacy ledger is damaged; put a copy of it back, or start again in "
                "another folder, where the count begins at nothing"
            )
        rows.append(row)
    if lines[-1]:
        write_safely(path, b"".join(line + b"\n" for line in lines[:-1]))
    return rows


def told(account: Account, federation: Federation, rounds: int) -> list[str]:
    """Say in one sentence for each promise what all rounds will spend."""
    said = [sentence(row, f"{rounds} rounds will spend") for row in account.forecast(federation, rounds)]
    return said + [f"the noise in the pipeline gives no epsilon: {reason}" for reason in account.missing]


def sentence(row: Row, spend: str) -> str:
    """Say a promise with what it is worth nothing without: unit, delta, sampling, steps, accountant."""
    (first, *others) = row["mechanisms"] or [{"noise": 0, "rate": 0, "steps": 0}]
    steps = first["steps"] + sum(other["steps"] for other in others)
    sampled = "Poisson sampling at" if row["level"] == "record" else "no amplification, rate"
    return (
        f"privacy: {spend} epsilon {row['epsilon']:.4g} at delta {row['delta']:g} for {row['unit']}, at client "
        f"{row['worst']}, the worst ({row['accountant']}; RDP {row['rdp']:.4g}; noise {first['noise']:g}, {sampled} "
        f"{first['rate']:.4g}, {steps} steps; clip {row['clip']:g})"
    )


def privacy_of(folder: Path, account: Account) -> Row:
    """Return the entry of results.json: what was spent."""
    if not account.levels:
        return {"privacy": [], "privacy_missing": list(account.missing)} if account.missing else {}
    return {"privacy": account.statements(Ledger(folder / "privacy.jsonl", account).rows)}
