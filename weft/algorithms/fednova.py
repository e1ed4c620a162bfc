"""fednova: each client's update is divided by how far its own number of steps carries, so that none pulls harder.

d_k = (w_k - w) / a_k and w <- w + (sum_k p_k a_k) sum_k p_k d_k, where a_k is how often the gradients count in
w_k - w. With K steps of rate lr: K for sgd, [K - m (1 - m^K) / (1 - m)] / (1 - m) with momentum m, and
(1 - (1 - lr mu)^K) / (lr mu) with a proximal term. Wang et al. 2020, arXiv:2007.07481. d_k and the number a_k travel;
equal a_k give fedavg. There is no a_k for adamw: `heuristic` counts steps and says so.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.proximal import pull
from weft.algorithms.refusals import one_rank
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, Facts, State, Tally, Tensors, Work


def fednova(mu: Annotated[float, Field(ge=0)] = 0.0, heuristic: bool = False) -> Algorithm:
    """Average updates per step and go the mean number of steps.

    mu: the strength of a pull to the received adapter (fedprox). heuristic: take the number of steps for a_k, whatever
    the optimizer and the schedule; no proof covers it.
    """

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        start = received["adapter"]
        change = trees.subtract(work.train(start, pull(start, mu)), start)
        a = work.steps.float() if heuristic else lengths(work.steps, work.momentum, work.lr * mu)
        return {"direction": trees.scale(change, 1 / a), "length": {"a": a[:, None]}}, kept

    def ahead(state: State, update: State) -> Tensors:
        return trees.add(state["adapter"], update["direction"], float(update["length"]["a"]))

    def server(state: State, update: State, tally: Tally) -> State:
        return {"adapter": ahead(state, update)}

    def effective(received: State, update: State, initial: Tensors) -> Tensors:
        return ahead(received, update)

    def check(facts: Facts) -> None:
        one_rank("fednova")(facts)
        if changed := sorted({"clip", "discrete_noise", "noise", "random_mask", "topk"} & set(facts.pipeline)):
            raise JobError(
                f"fednova sends the number of its steps beside a direction, and {changed[0]} would change it: choose "
                f"fedavg, or leave {changed[0]} out"
            )
        if not heuristic:
            _check(facts, mu)

    return Algorithm(client=client, server=server, effective=effective, check=check)


def lengths(steps: Tensor, momentum: float, shrink: float) -> Tensor:
    """Return a_k of each client, (clients,); shrink: lr mu, of which the proximal term takes away in each step."""
    count = steps.double()
    if momentum:
        count = (count - momentum * (1 - momentum**count) / (1 - momentum)) / (1 - momentum)
    elif shrink:
        count = (1 - (1 - shrink) ** count) / shrink
    return count.to(torch.float32)


def _check(facts: Facts, mu: float) -> None:
    if facts.optimizer != "sgd":
        raise JobError(
            f"fednova divides by how far sgd goes in a client's steps, which {facts.optimizer} has no formula for: set "
            "local.optimizer to sgd, or algorithm.fednova.heuristic to true to count steps"
        )
    if facts.momentum and mu:
        raise JobError("fednova knows momentum or a proximal term, not both: set local.momentum or mu to 0")
    if facts.momentum and facts.moments == "keep":
        raise JobError("fednova counts momentum from zero in each round: set local.moments to reset")
    if facts.schedule != "constant" or facts.warmup:
        raise JobError(
            "fednova counts every step alike: set local.schedule to constant and local.warmup to 0, or "
            "algorithm.fednova.heuristic to true"
        )
    if facts.lr * mu >= 1:
        raise JobError(f"fednova needs lr mu below 1, and {facts.lr:g} x {mu:g} is not: lower mu or local.lr")
