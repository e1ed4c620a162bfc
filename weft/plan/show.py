"""A plan as tables on the terminal."""

import resource
from datetime import timedelta

from rich.console import Console
from rich.filesize import decimal as size
from rich.table import Table

from weft.plan.plan import MIB, Plan


def show(plan: Plan, budget: float | None = None) -> None:
    """Print a plan; budget: MiB that the whole run may send, both ways."""
    console = Console()
    own = plan.own
    console.print(
        f"{own.name}: {own.trained:,} of {own.total:,} parameters are trained ({own.trained / own.total:.4%}); "
        f"a message with them has {own.bytes:,} bytes",
        soft_wrap=True,
        highlight=False,
    )
    console.print(_counts(plan))
    console.print(_memory(plan))
    console.print(_run(plan, budget))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _counts(plan: Plan) -> Table:
    job = plan.job
    table = _table(
        f"{job.model.name} ({plan.family}), {plan.own.total:,} parameters",
        "adapter",
        "trained",
        "of all",
        "bytes a client and round, one way",
    )
    for count in (plan.own, *plan.others):
        if count.reason:
            table.add_row(count.name, "-", "-", count.reason)
        else:
            share = f"{count.trained / count.total:.4%}"
            table.add_row(count.name, f"{count.trained:,}", share, f"{count.bytes:,} ({size(count.bytes)})")
    return table


def _memory(plan: Plan) -> Table:
    needed, own = plan.memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    longest = f"{len(plan.lengths)} examples of up to {max(plan.lengths)} tokens"
    table = _table(f"Memory of one client's step, {longest}", "", "")
    rows = {
        f"base, {plan.job.model.dtype}": needed.base,
        "adapter, received and in training, and its gradient": needed.adapter,
        f"optimizer, {plan.job.local.optimizer}": needed.optimizer,
        "activations and workspace": needed.activations,
        "kept by the allocator (CPU)": needed.allocator,
        "together": needed.total,
        "the process itself, as this one": own,
    }
    for name, value in rows.items():
        table.add_row(name, f"{value / MIB:,.0f} MiB")
    return table


def _run(plan: Plan, budget: float | None) -> Table:
    job, sent = plan.job, plan.traffic
    table = _table("The run", "", "")
    table.add_row("clients a round, rounds", f"{plan.per_round or 'not known'}, {job.rounds}")
    table.add_row("a client sends a round", f"{sent.up:,} ({size(sent.up)})")
    table.add_row("a client receives a round", f"{sent.down:,} ({size(sent.down)})")
    if sent.note:
        table.add_row("", sent.note)
    if plan.in_all is not None:
        table.add_row("the whole run, both ways", f"{plan.in_all:,} ({size(plan.in_all)})")
    if budget and plan.in_all is not None:
        table.add_row("of the budget", f"{plan.in_all / MIB / budget:.1%} of {budget:,.0f} MiB")
    if plan.steps:
        table.add_row("steps a client and round", f"{plan.steps[0]:,} to {plan.steps[1]:,}")
    for name, value in _times(plan).items():
        table.add_row(name, value)
    table.add_row("epsilon", plan.epsilon)
    return table


def _times(plan: Plan) -> dict[str, str]:
    """Return what a probe says of time; training alone, one client after the other."""
    if plan.seconds is None:
        return {"time": "not probed; --probe takes two steps on this machine"}
    told = {"a step here, probed": period(plan.seconds)}
    if plan.steps and plan.per_round:
        low, high = (plan.seconds * steps for steps in plan.steps)
        told["a client's round"] = f"{period(low)} to {period(high)}"
        told["training, all rounds here"] = f"up to {period(high * plan.per_round * plan.job.rounds)}"
    return told


def period(seconds: float) -> str:
    """Write a duration.

    >>> period(0.25), period(7_260)
    ('0.25 s', '2:01:00')
    """
    return f"{seconds:.2f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
