"""The report's section on differential privacy: each promise with its unit, its numbers and its conditions."""

from collections.abc import Sequence
from typing import Any

from weft.report.folder import Folder, Row
from weft.report.markup import Html, facts, items, number, says, table, told


def privacy(run: Folder) -> str:
    """Return the whole section; nothing where no noise was added."""
    found: Sequence[Row] = run.results.get("privacy", [])
    missing = run.results.get("privacy_missing", [])
    spent = [row["epsilon"] for row in run.rounds if row.get("epsilon") is not None]
    if found:
        inside = "".join(map(_promise, found))
    elif missing:
        inside = says(f"There is noise in the pipeline, and no epsilon can be given: {'; '.join(missing)}.")
    elif spent:
        inside = says(f"Not finished: epsilon {told(spent[-1])} is spent so far.")
    else:
        return ""
    return f'<section id="privacy">\n<h2>Differential privacy</h2>\n{inside}</section>'


def _accountant(row: Row) -> str:
    if row["pld"] is None:
        return (
            f"RDP {number(row['rdp'])}; no PLD, which is not proven for this noise or takes too long at such an epsilon"
        )
    return f"{row['accountant']}; PLD {number(row['pld'])}, RDP {number(row['rdp'])} as a cross-check"


def _promise(row: Row) -> str:
    steps = "; ".join(
        f"{m['steps']:,} at noise {number(m['noise'])}, rate {number(m['rate'])}" for m in row["mechanisms"]
    )
    lead = f"Epsilon {told(row['epsilon'])} at delta {row['delta']:g} for {row['unit']}."
    rows: dict[str, Any] = {
        "Protected": f"{row['unit']}: present or absent",
        "Worst client": row["worst"],
        "Clip": number(row["clip"]),
        "Steps": steps,
        "Sampling": row["sampling"],
        "Accountant": _accountant(row),
    }
    clients = [[name, told(value)] for name, value in row["clients"].items()]
    each = table("Epsilon of each client", ["Client", "Epsilon"], clients) if len(clients) > 1 else ""
    holds = Html("<h3>It holds under these conditions</h3>") + items(row["conditions"])
    return says(lead) + facts(rows) + holds + each
