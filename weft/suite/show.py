"""What the terminal shows of a suite: a bar over its cells above those of the run, the leaderboard at the end."""

from pathlib import Path
from typing import Any

from rich.console import Console

from weft.show import Display
from weft.suite.run import bench


def bench_shown(path: Path, out: Path | None, **given: Any) -> None:
    """Run a suite before the user's eyes; where there is no terminal, a line a cell."""
    folder = out or Path("runs") / path.stem
    with Display() as display:
        bar = display.progress.add_task("cells", total=None, loss="")

        def tell(number: int, of: int, cell: str, what: str) -> None:
            display.progress.update(bar, total=of, completed=number - 1, description=f"cell {number}: {cell}")
            if not display.console.is_terminal:
                display.console.print(f"cell {number} of {of}: {cell}: {what}", markup=False, soft_wrap=True)

        try:
            bench(path, out, watch=display, tell=tell, **given)
        finally:
            _told(folder)


def _told(folder: Path) -> None:
    table = folder / "leaderboard.md"
    if table.is_file():
        Console().print(table.read_text(encoding="utf8"), markup=False, soft_wrap=True)
        Console().print(f"page     {folder / 'leaderboard.html'}", f"tables   {table}", sep="\n", soft_wrap=True)
