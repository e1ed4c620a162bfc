"""The commands of real sites: keys, serve, join; no logic here, and heavy imports only inside a command."""

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(help="Keys of sites and coordinators.", no_args_is_help=True)

Certs = Annotated[Path, typer.Option("--certs", help="Where the coordinator's CA and certificate are, or are made.")]


@keys.command("new")
def new_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site's name; NAME.key is written here.")],
) -> None:
    """Make a private key, NAME.key, and print the public one for the job."""
    from weft import identity

    made = identity.new()
    identity.save(made, Path(f"{name}.key"))
    typer.echo(f"{name}.key holds the private key: it stays on this machine. The line for the job's sites:\n")
    typer.echo(f"  {name}: {{key: {made.public}}}")


@keys.command("show")
def show_key(file: Annotated[Path, typer.Argument(metavar="FILE", help="A private key, NAME.key.")]) -> None:
    """Print the public key of a private one."""
    from weft import identity

    typer.echo(identity.load(file).public)


def serve(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A job file with its `sites`.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where sites connect.")] = "0.0.0.0:9092",
    name: Annotated[
        list[str] | None, typer.Option("--name", help="A name or address that sites use; may be repeated.")
    ] = None,
    certs: Certs = Path("weft-certs"),
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/<name of the job> when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the folder stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete a run that is in the folder.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Let every site compute as `weft run --exact` does.")] = False,
    absent: Annotated[float, typer.Option(min=1, help="Seconds after which a silent site is lost.")] = 600.0,
    room: Annotated[int, typer.Option(min=1, help="MB of replies that are taken at a time; others wait.")] = 512,
) -> None:
    """Run a job between the real sites that it names; this machine needs no model and no records."""
    from weft.deploy import needs_flower
    from weft.deploy.certificates import certificates
    from weft.job import load
    from weft.runs import folder_of
    from weft.show import Display, show_results

    needs_flower()
    from weft.deploy.serve import Place, address_of
    from weft.deploy.serve import serve as serve_job

    loaded, address = load(job), address_of(listen)
    names = [*(name or []), *([] if address[0] in ("0.0.0.0", "::") else [address[0]]), "localhost", "127.0.0.1"]
    place = Place(address, certificates(certs, names), absent, room << 20)
    with Display() as display:
        folder = out or folder_of(job)
        finished = serve_job(loaded, folder, place, display, resume=resume, overwrite=overwrite, exact=exact)
    show_results(finished)


def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The coordinator.")],
    name: Annotated[str, typer.Option("--as", help="This site's name in the job.")],
    data: Annotated[Path, typer.Option(help="Training records of this site; they stay here.")],
    model: Annotated[str, typer.Option(help="The base model's folder on this machine, or a Hugging Face name.")],
    test: Annotated[Path | None, typer.Option(help="Test records of this site; sums over them leave.")] = None,
    key: Annotated[Path | None, typer.Option(help="This site's private key; NAME.key when not given.")] = None,
    ca: Annotated[Path, typer.Option(help="The coordinator's ca.pem.")] = Path("ca.pem"),
    accept: Annotated[str | None, typer.Option(metavar="HASH", help="Accept the job with this hash unasked.")] = None,
    policy: Annotated[Path | None, typer.Option(help="What this site allows.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Memories and result; weft-NAME when not given.")] = None,
) -> None:
    """Take part in a run: train on this site's records when asked, send nothing but what the job says."""
    from weft.deploy import needs_flower

    needs_flower()
    from weft import identity
    from weft.deploy import policy as policies
    from weft.deploy.join import join as join_run
    from weft.deploy.own import Own
    from weft.deploy.show import confirm, say

    own = Own(
        name,
        data,
        test,
        model,
        identity.load(key or Path(f"{name}.key")),
        folder or Path(f"weft-{name}"),
        policies.read(policy),
        accept,
    )
    join_run(address, own, ca, confirm, say)


def demo(
    sites: Annotated[int, typer.Option(min=2, max=26, help="How many sites.")] = 3,
    out: Annotated[Path, typer.Option(help="A new folder for everybody's files.")] = Path("weft-demo"),
) -> None:
    """Show a federation of real processes on this machine, with keys and TLS, on a tiny model."""
    from weft.deploy import needs_flower
    from weft.deploy.demo import demo as show

    needs_flower()
    folder = show(out, sites, typer.echo)
    typer.echo(f"report   {folder / 'report.html'}")


def add_to(app: typer.Typer) -> None:
    """Add the commands to Weft's."""
    app.add_typer(keys, name="keys")
    app.command()(serve)
    app.command()(join)
    app.command()(demo)
