"""What a site's terminal shows: the job before it is accepted, then a line for whatever happens."""

import sys
from datetime import datetime

from rich.console import Console
from rich.table import Table

from weft.deploy.summary import Summary


def say(text: str) -> None:
    """Print one line with the time."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def confirm(summary: Summary) -> bool:
    """Show the job and ask once; where nobody can answer, the answer is no."""
    table = Table(title="A job for this site", title_justify="left", show_header=False)
    for name, value in summary.rows.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)
    if not sys.stdin.isatty():
        say(f"nobody is here to ask; accept it with --accept {summary.rows['job'][:16]}")
        return False
    return input("Take part? Type yes: ").strip().lower() in ("y", "yes")
