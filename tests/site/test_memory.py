"""What clients keep is on disk: a process holds no more of it however many clients were asked."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.conftest import write_records
from weft import Job
from weft.core.types import State
from weft.site.memory import Memory
from weft.watch import Watch


class Held(Watch):
    """Counts the tensors of the process after each round."""

    def __init__(self) -> None:
        self.tensors: list[int] = []

    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        gc.collect()
        self.tensors.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))


@pytest.fixture
def many(values: dict[str, Any], tmp_path: Path) -> Job:
    """Return a job of 24 clients, four asked in each of six rounds, each once, that keep moments and variates."""
    write_records(tmp_path / "train.jsonl", 24)
    values |= {"rounds": 6, "baselines": [], "algorithm": "scaffold", "evaluate": {"every": 0, "on": ["loss"]}}
    values["data"] = values["data"] | {"split": {"iid": {"clients": 24}}}
    values["clients"] = {"per_round": 4, "sampler": "round_robin"}
    values["pipeline"] = [{"weigh": {"by": "uniform"}}]
    values["local"] |= {"optimizer": "sgd", "schedule": "constant", "steps": 1}
    return Job(**values)


def test_tensors_do_not_grow_with_the_clients_that_were_asked(many: Job, tmp_path: Path) -> None:
    """The first round has still to make some that stay, such as the site's own first adapter."""
    held = Held()
    weft.run(many, tmp_path / "run", watch=held, report=False)
    assert len(list((tmp_path / "run" / "clients").iterdir())) == 24
    assert len(set(held.tensors[1:])) == 1


def test_a_memory_that_holds_on_is_seen(many: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[State] = []
    save = Memory.save

    def holding(self: Memory, client: str, round_: int, memory: State, since: int) -> None:
        kept.append(memory)
        save(self, client, round_, memory, since)

    monkeypatch.setattr(Memory, "save", holding)
    held = Held()
    weft.run(many, tmp_path / "run", watch=held, report=False)
    assert held.tensors[1:] == sorted(set(held.tensors[1:]))


def test_a_client_has_two_memories_at_most(tmp_path: Path) -> None:
    """That of the round that was counted last, and the newest; what a crash left between goes."""
    memory = Memory(tmp_path)
    for number, since in ((1, 0), (2, 1), (3, 1), (4, 3)):
        memory.save("a", number, {"part": {"x": torch.tensor([float(number)])}}, since)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["000003.safetensors", "000004.safetensors"]
    assert memory.load("a", 3)["part"]["x"].item() == 3.0
