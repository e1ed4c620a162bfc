"""Where the values of a job stand: an error that begins with a key gets the file and the line of that key."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from weft import yaml12
from weft.core.errors import JobError, KeyProblem, dotted


@dataclass(frozen=True)
class Source:
    """Where the values of a job stand; two jobs are equal wherever they come from."""

    name: str = field(default="", compare=False)
    lines: Mapping[yaml12.Path, int] = field(default_factory=dict, compare=False)
    changed: Sequence[tuple[str, ...]] = field(default=(), compare=False)
    """Keys that --set gave."""

    def locate(self, error: JobError) -> JobError:
        """Put file and line, or --set, before an error that begins with a key, as `local.lr: ...` does."""
        key = str(error).partition(": ")[0]
        if not self.name or not (isinstance(error, KeyProblem) or is_key(key)):
            return error
        if any(_within(key, dotted(steps)) for steps in self.changed):
            return JobError(f"--set {error}")
        known = [path for path in self.lines if path and _within(key, dotted(path))]
        line = f", line {self.lines[max(known, key=len)]}" if known else ""
        return JobError(f"{self.name}{line}: {error}")


def is_key(key: str) -> bool:
    """Tell a key of a job from a file, which an error may begin with as well: `data.train` from `data.jsonl`."""
    from weft.job import Job

    first, *rest = re.split(r"[.\[]", key)
    if first not in Job.model_fields:
        return False
    section = Job.model_fields[first].annotation
    if inspect.isclass(section) and issubclass(section, BaseModel):
        return bool(rest) and rest[0] in section.model_fields
    return True


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))
