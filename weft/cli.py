"""The commands; no logic here, and heavy imports only inside a command."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from weft import __version__
from weft.core.errors import WeftError
from weft.deploy import commands
from weft.signals import Stopped, stoppable

app = typer.Typer(
    name="weft",
    help="Federated parameter-efficient fine-tuning of language models: only adapters travel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file, such as examples/medquad.yaml.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/medquad.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job; may be repeated."),
]


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    """Weft's own options, before the name of a command; `main` reads them."""


@app.command()
def run(
    job: JobFile,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/<name of the job> when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the folder stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete a run that is in the folder.")] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Give the same bytes on any machine of this kind: one thread, slower."),
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0: by the size of the model.")] = 0,
    block: Annotated[int, typer.Option(min=0, help="Clients trained in one pass; 0: as many as fill a step.")] = 0,
    devices: Annotated[
        str, typer.Option(help="A worker process for each: cpu*2, cuda (every GPU) or cuda:0,cuda:1.")
    ] = "",
    on: Annotated[
        str, typer.Option(metavar="ray", help="Workers on a Ray cluster; without --devices, all of it.")
    ] = "",
    address: Annotated[str, typer.Option(help="Of a Ray cluster that is there already.")] = "",
    track: Annotated[
        list[str] | None,
        typer.Option("--track", metavar="NAME", help="Send each round to tensorboard, mlflow or wandb as well."),
    ] = None,
    set_: Sets = None,
) -> None:
    """Run a job, simulated on this machine."""
    from weft.job import load
    from weft.runs import folder_of
    from weft.runs import run as run_job
    from weft.show import Display, show_results
    from weft.trackers.tracker import Tracked

    loaded, folder = load(job, set_ or []), out or folder_of(job)
    with Display() as display:
        settings: dict[str, Any] = {"exact": exact, "block": block, "threads": threads}
        settings |= {"devices": devices, "on": on, "address": address}
        watch = Tracked(display, folder, loaded, track or ())
        finished = run_job(loaded, folder, resume=resume, overwrite=overwrite, watch=watch, **settings)
    show_results(finished)


@app.command()
def check(
    job: JobFile,
    set_: Sets = None,
    model: Annotated[bool, typer.Option(help="Load the model as well and count what is trained and sent.")] = True,
) -> None:
    """Check a job: first all that needs no model, then what does; train nothing."""
    from weft.job import load
    from weft.prepare import prepare, set_up
    from weft.show import show_model, show_plan

    prepared = prepare(load(job, set_ or []))
    show_plan(prepared)
    if model:
        show_model(set_up(prepared))


@app.command()
def bench(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="A suite file, such as examples/suites/medquad.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="The suite's folder; runs/<name of the suite> when not given.")
    ] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="Run nothing; write the tables of what is finished.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="As of `weft run`.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="As of `weft run`.")] = 0,
    block: Annotated[int, typer.Option(min=0, help="As of `weft run`.")] = 0,
    set_: Sets = None,
) -> None:
    """Run a suite of jobs, or go on with it, and write its leaderboard."""
    from weft.suite.show import bench_shown

    bench_shown(suite, out, overrides=set_ or [], tables_only=tables, exact=exact, threads=threads, block=block)


@app.command()
def plan(
    job: JobFile,
    probe: Annotated[bool, typer.Option("--probe", help="Load the model and time two steps.")] = False,
    budget: Annotated[float | None, typer.Option(min=1e-9, help="MiB that the whole run may send, both ways.")] = None,
    set_: Sets = None,
) -> None:
    """Say what a job will take before anything is trained: parameters, bytes, memory, time."""
    from weft.job import load
    from weft.plan.plan import plan as plan_job
    from weft.plan.show import show

    show(plan_job(load(job, set_ or []), probe=probe), budget)


@app.command()
def report(run: RunFolder) -> None:
    """Write the report of a run folder again."""
    from weft.report import write_report
    from weft.runs import Run

    Run(run).check()
    typer.echo(write_report(run))


@app.command("import")
def import_(
    kind: Annotated[str, typer.Argument(metavar="ianvs|flowertune", help="Whose configuration it is.")],
    source: Annotated[Path, typer.Argument(metavar="FILE", help="benchmarkingjob.yaml, or pyproject.toml.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the job.")],
    model: Annotated[str | None, typer.Option(help="A base in place of the source's.")] = None,
    train: Annotated[str | None, typer.Option(help="Training records in place of the source's.")] = None,
    test: Annotated[str | None, typer.Option(help="Held-out records in place of the source's.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients, which FlowerTune keeps outside its file.")] = 20,
) -> None:
    """Turn another framework's configuration into a job, and name every key that is not carried over."""
    from weft.importers.show import import_shown

    import_shown(kind, source, out, model=model, train=train, test=test, clients=clients)


@app.command()
def ask(
    run: RunFolder,
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 64,
) -> None:
    """Ask the federated model a question, and the untrained base beside it."""
    from weft.ask import ask as ask_run
    from weft.runs import Run
    from weft.show import show_answers

    show_answers(question, ask_run(Run(run), question, tokens))


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base: a whole model.")] = False,
    client: Annotated[
        str | None, typer.Option("--client", help="The client's own adapter.", show_default=False)
    ] = None,
) -> None:
    """Copy the adapter of a run, or a model with the adapter merged in."""
    from weft.export import export as export_run
    from weft.runs import Run

    typer.echo(export_run(Run(run), to, merge, client))


@app.command()
def audit(
    run: RunFolder,
    canaries: Annotated[int, typer.Option(min=20, help="Most test records to use as canaries.")] = 1000,
    repeat: Annotated[int, typer.Option(min=1, help="Copies of each canary that is in.")] = 1,
) -> None:
    """Train the job of a run once more with canaries, and say what epsilon they disprove."""
    from weft.audit.canaries import audit_run
    from weft.runs import Run
    from weft.show import show_audit

    show_audit(Run(run), audit_run(Run(run), canaries, repeat))


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="A plug-in, such as lora, dirichlet or fedavg.")],
) -> None:
    """Show what a plug-in does and the keys that it takes."""
    from weft.explain import explain as explain_plugin

    typer.echo(explain_plugin(name))


commands.add_to(app)

_STOPPED = 130  # what a shell calls an end by Ctrl-C, and what typer returns instead of raising
# `UsageError` is click's, or that of typer's own copy of click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _fail(error: BaseException, code: int, text: str) -> NoReturn:
    if "--debug" in sys.argv:
        raise error
    typer.echo(f"error: {' '.join(text.split())}", err=True)
    sys.exit(code)


def _misused(error: Any) -> NoReturn:
    """Say in one sentence what is wrong with the command line; a bare `weft` shows the help."""
    sentences = dict.fromkeys(re.split(r"(?<=[.?]) ", str(error.format_message())))  # click and typer suggest the same
    text = " ".join(sentences)
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(text, err=True)
        sys.exit(2)
    command = error.ctx.command_path if error.ctx else "weft"
    _fail(error, 2, f"{text.removesuffix('.')} (try `{command} --help`)")


def _going_on(arguments: list[str]) -> str:
    """Say how to take up what was stopped."""
    if "join" in arguments[:1]:
        return "the same `weft join` takes part again"
    return f"go on with `weft {'serve' if 'serve' in arguments[:1] else 'run'} JOB --resume`"


def main() -> None:
    """Run the command line: exit 2 for the user's mistakes, 1 for a failed run, 3 for refused by policy."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads: spinning threads starve others
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    if arguments == ["--version"]:
        typer.echo(f"weft {__version__}")
        return
    try:
        with stoppable():
            if app(args=arguments, prog_name="weft", standalone_mode=False) == _STOPPED:
                raise KeyboardInterrupt
    except _UsageError as error:
        _misused(error)
    except WeftError as error:
        _fail(error, error.exit_code, str(error))
    except (KeyboardInterrupt, Stopped) as error:
        code = error.exit_code if isinstance(error, Stopped) else _STOPPED
        _fail(error, code, f"stopped; what was finished is kept, {_going_on(arguments)}")
    except PermissionError as error:
        _fail(error, 2, f"{error.filename}: {error.strerror}; change its permissions, or choose another place")
    except OSError as error:
        _fail(error, 1, f"{error.filename or 'the system'}: {error.strerror or error}")
    except Exception as error:  # a defect of ours: still one sentence
        _fail(error, 1, f"{type(error).__name__}: {error} (a defect of Weft; --debug shows where)")


if __name__ == "__main__":
    main()
