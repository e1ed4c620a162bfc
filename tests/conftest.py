"""A small job on the shipped model: three clients, three rounds, twelve records."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads that spin for tiny products only slow each other down

import pytest

from weft import Job
from weft.watch import Watch

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = ["asthma", "diabetes", "gout", "measles", "anemia", "scurvy", "rabies", "malaria", "cholera", "rickets"]


class Stop(Watch):
    """Stops a run as Ctrl-C would, once a round is committed."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        if number == self.after:
            raise KeyboardInterrupt


def write_records(path: Path, count: int, offset: int = 0) -> None:
    """Write question-answer records of three sites, of unlike lengths."""
    rows = [
        {
            "question": f"What is {WORDS[(i + offset) % 10]}?",
            "answer": f"{WORDS[(i + offset) % 10]} is a disease. " * (1 + i % 3),
            "site": f"site-{i % 3}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Return the values of the small job, ready to change; its data stands in tmp_path."""
    return small_job(tmp_path)


def small_job(folder: Path) -> dict[str, Any]:
    """Write the records of the small job into a folder and return its values."""
    write_records(folder / "train.jsonl", 14)
    write_records(folder / "test.jsonl", 6, 5)
    return {
        "model": {"name": str(EXAMPLES / "models" / "stories260K")},
        "adapter": {"lora": {"rank": 2, "alpha": 6, "targets": ["q_proj", "v_proj"]}},
        "task": {"causal_lm": {"max_length": 48}},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "split": {"by": "site"}},
        "local": {"lr": 0.01, "batch": 2},
        "rounds": 3,
        "evaluate": {"on": ["loss"]},
        "baselines": ["untrained"],
        "seed": 3,
        "folder": folder,
    }


@pytest.fixture
def job(values: dict[str, Any]) -> Job:
    """Return the small job."""
    return Job(**values)
