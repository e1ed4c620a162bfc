"""What the terminal shows: progress while it runs, tables when it is done."""

import json
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft.files import write_safely
from weft.prepare import METHODS, Bench, Prepared
from weft.runs import Run
from weft.spending import told
from weft.watch import Watch

LABELS = {
    "untrained": "untrained base",
    "local": "local only (mean)",
    "centralized": "centralized",
    "federated": "federated",
}


class Display(Watch):
    """One bar for rounds, one for clients, the live loss; a line a round where there is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.rounds = self.progress.add_task("loading", total=None, loss="")
        self.clients = self.progress.add_task("clients", total=None, loss="")

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def begin(self, method: str, done: int, rounds: int, clients: int) -> None:
        """Show a method's rounds from the first."""
        self.progress.update(self.rounds, description=f"{method}: round", total=rounds, completed=done, loss="")
        self.progress.update(self.clients, total=clients, completed=0)

    def client(self, name: str) -> None:
        """Move the bar of clients."""
        self.progress.update(self.clients, advance=1, description="client")

    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        """Move the bar of rounds and show the loss."""
        parts = [
            f"{label} loss {row[key]:.3f}"
            for label, key in (("train", "train_loss"), ("test", "test_loss"))
            if row.get(key) is not None  # under discrete noise nobody tells a loss
        ]
        self.progress.update(self.rounds, completed=number, loss=", ".join(parts))
        self.progress.update(self.clients, completed=0)

    def notice(self, text: str) -> None:
        """Print a notice above the bars."""
        self.console.print(f"notice: {text}", markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def show_results(run: Run) -> None:
    """Print the methods side by side, overall and per test group."""
    console, results = Console(), run.results
    methods = {name: results["methods"][name] for name in METHODS if name in results["methods"]}
    names = list(methods["federated"]["overall"])
    overall = _table("All test records", "", *names)
    for method, scores in methods.items():
        overall.add_row(LABELS[method], *(_number(scores["overall"].get(name)) for name in names))
    console.print(overall)
    groups = methods["federated"]["groups"]
    if len(groups) > 1:
        table = _table(f"Per test group: {names[0]}", "", *(LABELS[method] for method in methods))
        for group in groups:
            table.add_row(group, *(_number(scores["groups"][group].get(names[0])) for scores in methods.values()))
        console.print(table)
    console.print(
        f"adapter  {run.folder / 'adapter'}",
        f"report   {run.folder / 'report.html'}",
        sep="\n",
        soft_wrap=True,
    )


def show_plan(prepared: Prepared) -> None:
    """Print what a job will do, as far as it is known without the model."""
    sizes = [len(rows) for rows in prepared.clients.values()]
    per_round = prepared.job.clients.per_round or len(sizes)
    steps = [prepared.plan.recipe.steps_of(size) for size in sizes]
    table = _table("The job is sound", "", "")
    rows = {
        "clients": f"{len(sizes)}, {per_round} a round, {prepared.job.rounds} rounds",
        "training records": f"{sum(sizes)} ({min(sizes)} to {max(sizes)} a client)",
        "test records": f"{len(prepared.test.records)} in {len(prepared.groups)} groups",
        "records skipped": f"{prepared.train.skipped} training, {prepared.test.skipped} test",
        "steps a client and round": f"{min(steps)} to {max(steps)}",
        "answers generated at the end": generated(prepared),
        "algorithm": prepared.job.algorithm.name,
        "pipeline": ", ".join(step.name for step in prepared.job.pipeline),
        "job hash": prepared.job.hash()[:16],
    }
    rows |= _privacy(prepared)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _privacy(prepared: Prepared) -> dict[str, str]:
    """Return what all rounds will spend, a row for each promise."""
    said = told(prepared.account(), prepared.federation(), prepared.job.rounds)
    return {"privacy" if i == 0 else "": one.removeprefix("privacy: ") for i, one in enumerate(said)}


def generated(prepared: Prepared) -> str:
    """Say what the scores of text cost: answers of every model that is measured, each token a forward pass."""
    from weft.tasks.text_metrics import GENERATED

    job = prepared.job
    if not set(GENERATED) & set(job.evaluate.on or prepared.task.metrics):
        return "none"
    most = job.evaluate.examples
    answers = sum(min(len(rows), most or len(rows)) for rows in prepared.groups.values())
    own = {"local": True, "federated": prepared.plan.algorithm.personal}
    models = sum(len(prepared.clients) if own.get(name) else 1 for name in ("federated", *job.baselines))
    return f"{answers:,} of at most {job.evaluate.max_new_tokens} tokens, by each of {models} models"


def show_model(bench: Bench) -> None:
    """Print what is trained and what travels."""
    from weft import ledger

    loaded, clients = bench.loaded, bench.prepared.federation().per_round
    adapter = {name: tensor.detach().cpu() for name, tensor in loaded.initial.items()}
    trainable = sum(tensor.numel() for tensor in adapter.values())
    total = loaded.size
    up, down = ledger.forecast(replace(bench.prepared.federation(), initial=adapter))
    packed = " before zstd" if any(step.name == "zstd" for step in bench.prepared.job.pipeline) else ""
    table = _table("The model", "", "")
    table.add_row("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})")
    table.add_row(f"bytes a client sends a round{packed}", f"{up:,}")
    table.add_row("bytes a round, both ways, all clients", f"{(up + down) * clients:,}")
    table.add_row("records cut to max_length", f"{sum(rows.truncated for rows in bench.train.values())}")
    table.add_row("device", str(loaded.device))
    Console().print(table)


def show_audit(run: Run, found: dict[str, Any]) -> None:
    """Print an audit, and keep it as audit.json in the run folder."""
    write_safely(run.folder / "audit.json", json.dumps(found, indent=1).encode())
    claimed = found["claimed"]
    verdict = "this run claims no epsilon" if claimed is None else f"{claimed:.4g}, which this attack does not disprove"
    rows = {
        "canaries": f"{found['canaries']}, each in by a fair coin, {found['repeat']} times",
        "guesses right": f"{found['right']} of {found['guesses']}",
        "area under the curve": f"{found['auc']:.3f} (0.5: no better than chance)",
        f"epsilon is at least ({found['confidence']:.0%})": f"{found['epsilon']:.3g}",
        "epsilon as claimed": f"{claimed:.4g}: DISPROVED" if found["disproved"] else verdict,
    }
    table = _table("Audit", "", "")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def show_answers(question: str, answers: dict[str, str]) -> None:
    """Print a question and the answers side by side."""
    table = Table(title=question, title_justify="left", show_lines=True)
    for name in answers:
        table.add_column(name, ratio=1)
    table.add_row(*answers.values())
    Console().print(table)
