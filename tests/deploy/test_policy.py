"""A site's limits: what is refused, with the reason; what a wrong file says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft import Job
from weft.core.errors import JobError, PolicyError
from weft.core.types import Wire
from weft.deploy import policy
from weft.deploy.policy import Asked, Policy
from weft.identity import new

SITES = {name: {"key": new().public} for name in ("a", "b", "c")}


def asked(hidden: bool = False, steps: int = 5, **changes: Any) -> Asked:
    values = {"model": {"name": "m"}, "adapter": "lora", "task": "causal_lm", "data": {}, "sites": SITES} | changes
    return Asked(Job(**values), Wire(hidden=hidden), steps)


def test_no_policy_allows_a_job_of_wefts_own() -> None:
    policy.check(Policy(), asked())
    policy.check_code(Policy(), asked().job.resolved())


@pytest.mark.parametrize(
    ("limits", "job", "says"),
    [
        ({"adapters": ["ia3"]}, asked(), "adapter: lora, and this site's policy allows adapters: ia3"),
        ({"algorithms": []}, asked(), "algorithm: fedavg, and this site's policy allows algorithms: none"),
        ({"tasks": ["classification"]}, asked(), "task: causal_lm"),
        ({"max_steps": 4}, asked(), "steps in a round: 5, and this site's policy allows max_steps: 4"),
        ({"max_rounds": 9}, asked(), "rounds: 10, and this site's policy allows max_rounds: 9"),
        ({"min_sites": 4}, asked(), "sites: 3, and this site's policy allows min_sites: 4"),
        ({"plaintext_updates": "refuse"}, asked(), "secure aggregation"),
    ],
)
def test_a_job_that_asks_for_more_is_refused(
    limits: dict[str, Any], job: Asked, says: str, record_property: Callable[[str, object], None]
) -> None:
    with pytest.raises(PolicyError, match=says) as caught:
        policy.check(Policy(**limits), job)
    record_property("said", str(caught.value))


def test_what_is_allowed_passes() -> None:
    limits = {"adapters": ["lora"], "algorithms": ["fedavg"], "tasks": ["causal_lm"], "max_steps": 5, "max_rounds": 10}
    policy.check(Policy(**limits, min_sites=3, plaintext_updates="refuse"), asked(hidden=True))


@pytest.mark.parametrize("values", [{"algorithm": "os.path:join"}, {"pipeline": [{"mine.steps:clip": {"norm": 1}}]}])
def test_code_of_the_jobs_own_is_refused_before_it_is_imported(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="names code of its own"):
        policy.check_code(Policy(), values)
    policy.check_code(Policy(code=["os.path:join", "mine.steps:clip"]), values)


def test_a_policy_file_is_read_and_a_wrong_one_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("adapters: [lora]\nmax_steps: 500\n")
    assert policy.read(path) == Policy(adapters=["lora"], max_steps=500)
    for text, says in (
        ("max_steps: 5\nmax_step: 5\n", r"policy.yaml, line 2: max_step: unknown key; did you mean `max_steps`\?"),
        ("max_steps: 0\n", "policy.yaml, line 1: max_steps: must be more than 0"),
        ("plaintext_updates: maybe\n", "must be 'accept' or 'refuse'"),
        ("- a\n", "a policy is a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(JobError, match=says):
            policy.read(path)
    with pytest.raises(JobError, match="there is no such file"):
        policy.read(tmp_path / "other.yaml")
