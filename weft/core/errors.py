"""The errors that Weft raises on purpose; each is one clear sentence and carries the exit code of the command."""

from collections.abc import Sequence
from difflib import get_close_matches


class WeftError(Exception):
    """Anything that went wrong and that a person can act on: what, where, what to do."""

    exit_code = 1


class JobError(WeftError):
    """The user's mistake: a job, a file, a record, a model folder or a command line that cannot be right."""

    exit_code = 2


class KeyProblem(JobError):
    """A mistake at a key of a job; whoever knows the file adds the line."""

    def __init__(self, path: tuple[str | int, ...], clause: str) -> None:
        self.path, self.clause = path, clause
        super().__init__(f"{dotted(path)}: {clause}" if path else clause)


def dotted(path: tuple[str | int, ...]) -> str:
    """Write a path in a job as people do.

    >>> dotted(("pipeline", 0, "weigh", "by"))
    'pipeline[0].weigh.by'
    """
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def near(word: str, words: Sequence[str]) -> str:
    """Return a did-you-mean clause, empty where nothing is near.

    >>> near("rnak", ["rank", "alpha"])
    '; did you mean `rank`?'
    """
    match = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean `{match[0]}`?" if match else ""


class RunError(WeftError):
    """A run that was sound when it began and failed on the way."""

    exit_code = 1


class PolicyError(WeftError):
    """A run refused by a policy: of the job, of the run folder or of a site."""

    exit_code = 3
