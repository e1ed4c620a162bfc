"""docs/privacy.md: its job is sound, and spends what the page says."""

import re
from pathlib import Path

import pytest

import weft
from weft.prepare import prepare
from weft.spending import told

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "privacy.md").read_text(encoding="utf8")


@pytest.fixture
def page_job(tmp_path: Path) -> weft.Job:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(ROOT / "examples" / name)
    (tmp_path / "job.yaml").write_text(text, encoding="utf8")
    return weft.load(tmp_path / "job.yaml")


def test_the_job_spends_what_the_page_says(page_job: weft.Job) -> None:
    prepared = prepare(page_job)
    (sentence,) = told(prepared.account(), prepared.federation(), page_job.rounds)
    (said,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert " ".join(said.split()) == sentence.removeprefix("privacy: ")


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert len(named) >= 4
    assert all((ROOT / path).is_file() for path in named)
