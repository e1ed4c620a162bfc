"""task_experts: one adapter for each task; a client belongs to a task by its name, and only its clients train it.

w_j <- the weighted mean over the clients of task j (experts.py): a client of another task never changes it. One task is
fedavg. With `split: {by: task}` clients are named by the column `task`, so a task may be a column of the records. The
routing is by task and not by a learned gate: a gate needs all experts in one forward pass, which no plain peft adapter
is. `adapters/` in the run folder holds one adapter a task; a client that was never asked uses the first task's.
"""

from fnmatch import fnmatchcase
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.experts import no_noise, routed
from weft.algorithms.refusals import one_rank
from weft.core.errors import JobError, RunError
from weft.core.types import Algorithm, Facts, Tensors, Work

Patterns = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


def task_experts(tasks: Annotated[dict[str, Patterns], Field(min_length=1)]) -> Algorithm:
    """Average within tasks that clients belong to.

    tasks: task -> patterns of the names of its clients, such as {billing: [bank-*], care: [clinic-*, ward-7]}.
    """

    def place_of(client: str) -> int | None:
        places = [i for i, task in enumerate(tasks) if any(fnmatchcase(client, pattern) for pattern in tasks[task])]
        return places[0] if len(places) == 1 else None

    def choose(work: Work, adapters: list[Tensors]) -> Tensor:
        places = [place_of(client) for client in work.clients]
        if None in places:
            raise RunError(f"client {work.clients[places.index(None)]} belongs to no task, or to several")
        return torch.tensor(places)

    def check(facts: Facts) -> None:
        one_rank("task_experts")(facts)
        no_noise("task_experts", facts)
        lost = [name for name in facts.names if place_of(name) is None]
        if lost:
            raise JobError(f"task_experts: client {lost[0]} belongs to no task, or to several; each has one")

    return routed(list(tasks), choose, check)
