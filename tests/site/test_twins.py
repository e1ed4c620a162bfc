"""Blocks side by side: the bytes of one thread, one base in memory, and nobody is waited for who is not needed."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weft import Job
from weft.core import trees
from weft.core.errors import RunError
from weft.core.types import Order, Reply
from weft.prepare import Bench, prepare, set_up
from weft.site.cohort import Cohort
from weft.site.site import Site
from weft.site.twins import side_by_side, twin


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(values: dict[str, Any]) -> Bench:
    return set_up(prepare(Job(**values)))


def site_of(bench: Bench, folder: Path, abreast: int, block: int = 1) -> Site:
    return replace(bench.site(folder, "federated", block, lambda text: None), abreast=abreast)


def order_of(site: Site) -> Order:
    return Order("train", 1, tuple(sorted(site.train)), {"adapter": site.initial})


def updates(replies: Iterator[Reply]) -> dict[str, str]:
    return {reply.client: trees.digest(reply.update) for reply in replies}


def test_a_twin_is_modules_over_the_same_memory(bench: Bench) -> None:
    loaded = bench.loaded
    other = twin(loaded)
    own, twins = dict(loaded.net.named_parameters()), dict(other.net.named_parameters())
    assert own.keys() == twins.keys()
    assert all(twins[name].data_ptr() == tensor.data_ptr() for name, tensor in own.items())
    assert not set(loaded.net.modules()) & set(other.net.modules())
    assert other.places.keys() == loaded.places.keys()
    raised = {name: tensor + 1 for name, tensor in other.initial.items()}
    with other.holding(raised):  # what one model computes with is not seen by the other
        assert all(value is loaded.initial[name] for name, value in loaded.net.named_parameters() if name in raised)


@pytest.mark.usefixtures("_two_threads")
def test_the_bytes_are_those_of_one_thread(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = site_of(bench, tmp_path, 2)
    at_once, both = set[str](), threading.Barrier(2)
    train = Cohort.train

    def met(cohort: Cohort, *args: Any, **keys: Any) -> Any:
        if len(at_once) < 2:
            at_once.add(threading.current_thread().name)
            both.wait(60)
        return train(cohort, *args, **keys)

    monkeypatch.setattr(Cohort, "train", met)
    together = updates(side.handle(order_of(side)))
    assert len(at_once) == 2
    assert torch.get_num_threads() == 2
    monkeypatch.undo()
    torch.set_num_threads(1)
    alone = site_of(bench, tmp_path, 1)
    assert together == updates(alone.handle(order_of(alone)))
    assert len(set(together.values())) == 3


@pytest.mark.usefixtures("_two_threads")
def test_a_client_at_fault_is_lost_alone(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Cohort.train

    def failing(cohort: Cohort, round_: int, clients: dict[str, Any], *args: Any) -> Any:
        if worst in clients:
            raise RunError("no memory")
        return train(cohort, round_, clients, *args)

    site = site_of(bench, tmp_path, 2, block=2)
    worst = min(site.train)
    monkeypatch.setattr(Cohort, "train", failing)
    failures = {reply.client: reply.failure for reply in site.handle(order_of(site))}
    assert failures == {name: "no memory" if name == worst else None for name in site.train}


@pytest.mark.usefixtures("_two_threads")
def test_a_defect_in_a_thread_is_raised(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cohort, "train", lambda *args: 1 / 0)
    site = site_of(bench, tmp_path, 2)
    with pytest.raises(ZeroDivisionError):
        list(site.handle(order_of(site)))
    assert not [thread for thread in threading.enumerate() if "work" in thread.name]


def test_who_turns_away_stops_the_others_before_their_next_step(bench: Bench, tmp_path: Path) -> None:
    """The second thread would go on for ever; control: until then it was not told to stop."""
    cohort = site_of(bench, tmp_path, 1).cohort
    seen: list[bool] = []

    def work(own: Cohort, task: int) -> int:
        if task:
            while not own.halt():
                seen.append(True)
        return task

    results = side_by_side([cohort, cohort], [0, 1, 2], work)
    assert next(results) == 0
    results.close()
    assert seen
    assert not cohort.halt()
    stopped = replace(cohort, halt=lambda: True)
    with pytest.raises(RunError, match="stopped"):
        stopped.train(1, {"a": bench.train[min(bench.train)].examples}, trees.expand(_initial(bench), 1), {}, None)


def _initial(bench: Bench) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in bench.loaded.initial.items()}
