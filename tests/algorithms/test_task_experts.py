"""task_experts: each task's adapter is the mean over its own clients, and nobody else's."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN
from weft.algorithms.experts import MARK
from weft.algorithms.fedavg import fedavg
from weft.algorithms.task_experts import task_experts
from weft.core.errors import JobError, RunError
from weft.core.types import Algorithm
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Toy

TASKS = {"one": ["a", "b"], "two": ["[cd]"], "three": ["e*"]}


def make() -> Algorithm:
    return task_experts(TASKS)


def test_each_task_is_fedavg_of_its_clients() -> None:
    """Against fedavg on each task's clients alone, every client in every round."""
    whole = toys.toy(5)
    state = toys.play(make, MEAN, 4, toy=whole).servers[-1].state
    for task, names in (("one", "ab"), ("two", "cd"), ("three", "e")):
        own = Toy({name: whole.clients[name] for name in names}, len(names))
        alone = toys.play(fedavg, MEAN, 4, toy=own).servers[-1].state["adapter"]
        assert reference.far(state[MARK + task], reference.wide(alone)) < 1e-5


def test_a_task_whose_clients_were_not_asked_stays() -> None:
    toy = toys.toy(2)
    servers = toys.play(make, MEAN, 6, toy=toy).servers
    for number, (before, after) in enumerate(pairwise(servers)):
        cohort = reference.cohorts(toy, number + 1)[-1]
        for task, names in (("one", "ab"), ("two", "cd"), ("three", "e")):
            same = bits(before.state[MARK + task]) == bits(after.state[MARK + task])
            assert same == (not set(cohort) & set(names))


def test_one_task_is_fedavg_bit_for_bit() -> None:
    one, other = (toys.play(rule, MEAN, 4, toy=toys.toy()) for rule in (lambda: task_experts({"all": ["*"]}), fedavg))
    assert bits(one.servers[-1].state[MARK + "all"]) == bits(other.servers[-1].state["adapter"])


def test_another_tasks_client_changes_nothing() -> None:
    """Even one with a target three times as large."""
    toy = toys.toy(5)
    wild = replace(toy.clients["e"], target={n: 3 * v for n, v in toy.clients["e"].target.items()})
    states = [
        toys.play(make, MEAN, 3, toy=Toy({**toy.clients, "e": client}, 5)).servers[-1].state
        for client in (toy.clients["e"], wild)
    ]
    assert bits(states[0][MARK + "one"]) == bits(states[1][MARK + "one"])
    assert bits(states[0][MARK + "three"]) != bits(states[1][MARK + "three"])


def test_planted_bug_a_mean_over_everybody_is_caught() -> None:
    def server(state: Any, update: Any, tally: Any) -> Any:
        return {part: update[part] for part in state}

    broken = toys.play(lambda: replace(make(), server=server), MEAN, 4, toy=toys.toy(5)).servers[-1].state
    own = Toy({name: toys.toy().clients[name] for name in "ab"}, 2)
    alone = toys.play(fedavg, MEAN, 4, toy=own).servers[-1].state["adapter"]
    assert reference.far(broken[MARK + "one"], reference.wide(alone)) > 1e-2


def test_every_client_has_one_task() -> None:
    make().check(replace(FACTS, names=tuple("abcde")))
    with pytest.raises(JobError, match="client z belongs to no task"):
        make().check(replace(FACTS, names=("a", "z")))
    with pytest.raises(JobError, match="client a belongs to no task, or to several"):
        task_experts({"one": ["a"], "two": ["*"]}).check(replace(FACTS, names=("a", "z")))
    with pytest.raises((RunError, AssertionError), match="client e belongs to no task"):
        toys.play(lambda: task_experts({"one": ["[abcd]"]}), MEAN, 1, toy=toys.toy(5))


def test_what_is_exported_is_one_adapter_a_task() -> None:
    state = make().init(toys.adapter())
    assert list(make().exports(state, toys.adapter())) == list(TASKS)
