"""The command line: fast to answer, one sentence for an error, the exit code for its kind."""

import subprocess
import sys

import pytest

from weft import __version__, cli
from weft.core.errors import JobError, PolicyError, RunError

COMMANDS = ("run", "check", "report", "ask", "export", "explain")
HEAVY = ("torch", "pydantic", "transformers", "peft", "numpy", "yaml")


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", *arguments])
    try:
        cli.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], []),
        (["--version"], []),
        (["run", "--help"], ["pydantic"]),  # typer itself, to read the options
        (["rnu"], ["pydantic"]),
    ],
    ids=["--help", "--version", "run --help", "rnu"],
)
def test_help_does_not_wait_for_heavy_imports(arguments: list[str], allowed: list[str]) -> None:
    """Run in a fresh interpreter and look at what it has imported."""
    forbidden = [name for name in HEAVY if name not in allowed]
    program = (
        f"import sys; sys.argv = ['weft', *{arguments!r}]\n"
        "from weft.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('heavy:', [name for name in {forbidden!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_check_of_imports_sees_an_import() -> None:
    """Show that the test above fails where the job is read: pydantic and yaml are found."""
    program = f"import sys; import weft.job; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "['pydantic', 'yaml']"


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"weft {__version__}\n"


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--help"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert [command for command in COMMANDS if f"\n  {command} " not in out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([command, "--help"], monkeypatch) == 0
    assert f"Usage: weft {command}" in capsys.readouterr().out


def test_a_bare_weft_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([], monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Usage: weft")
    assert captured.out == ""


def test_explain_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["explain", "weigh"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith("weigh (transform): weft/transforms/weigh.py\n")


DEFECT = "(a defect of Weft; --debug shows where)"
RAISED = {
    "job": (JobError("a job"), 2, "error: a job\n"),
    "run": (RunError("a run"), 1, "error: a run\n"),
    "policy": (PolicyError("a policy"), 3, "error: a policy\n"),
    "several lines": (JobError("one\n  two"), 2, "error: one two\n"),
    "permission": (
        PermissionError(13, "Permission denied", "there"),
        2,
        "error: there: Permission denied; change its permissions, or choose another place\n",
    ),
    "system": (OSError(28, "No space left on device", "there"), 1, "error: there: No space left on device\n"),
    "system without a name": (OSError("odd"), 1, "error: the system: odd\n"),
    "defect": (ValueError("odd"), 1, f"error: ValueError: odd {DEFECT}\n"),
    "stopped": (
        KeyboardInterrupt(),
        130,
        "error: stopped; what was finished is kept, go on with `weft run JOB --resume`\n",
    ),
}


@pytest.mark.parametrize(("error", "code", "text"), RAISED.values(), ids=RAISED)
def test_every_error_has_its_code_and_one_line(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("weft.explain.explain", fail)
    assert call(["explain", "weigh"], monkeypatch) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)
    monkeypatch.setattr(sys, "argv", ["weft", "explain", "weigh", "--debug"])
    with pytest.raises(type(error)):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "job.yaml"], "go on with `weft run JOB --resume`"),
        (["serve", "job.yaml"], "go on with `weft serve JOB --resume`"),
        (["join", "host:9092", "--as", "serve"], "the same `weft join` takes part again"),
    ],
)
def test_a_stopped_command_says_how_to_go_on(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(**given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stopped)
    assert call(arguments, monkeypatch) == 130
    assert capsys.readouterr().err == f"error: stopped; what was finished is kept, {says}\n"
