"""scaffold: control variates take the drift of unlike clients out of every local step.

Client k steps by g - c_k + c and ends at y; c_k <- c_k - c + (w - y) / (K lr), the mean gradient that it saw less its
correction (option II). The server adds lr times the mean of y - w, and |S|/N times the mean of the change of c_k, to
w and to c. Karimireddy et al. 2020, arXiv:1910.06378. c_k stays at its client; up and down 2 P.

w and c are averaged with the same weights, those of the pipeline, so that c is the mean of all c_k in the weights of
the objective: with every client in every round by any weights, with a part of them only where each counts once, which
`check` asks for. It asks for sgd without momentum at a constant rate as well: only then (w - y) / (K lr) is a mean
gradient. local.clip bounds the corrected gradient; where it binds, c_k moves by what is left, towards the same end.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from weft.algorithms.refusals import one_rank
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, Facts, State, Tally, Tensors, Work


def scaffold(lr: Annotated[float, Field(gt=0)] = 1.0) -> Algorithm:
    """Correct each local step by the difference between everyone's gradient and the client's own.

    lr: the server's learning rate.
    """

    def init(adapter: Tensors) -> State:
        return {"adapter": adapter, "control": trees.zeros(adapter)}

    def keep(adapter: Tensors) -> State:
        return {"control": trees.zeros(adapter)}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        start, control = received["adapter"], received["control"]
        offsets = trees.by_rows(trees.subtract(control, kept["control"]))

        def gradient(grads: Tensors, params: Tensors, rows: Tensor) -> Tensors:
            return trees.add(grads, offsets(rows))

        ended = work.train(start, gradient)
        seen = trees.scale(trees.subtract(start, ended), 1 / (work.steps * work.lr))  # mean corrected gradient
        change = trees.subtract(seen, control)
        return {"adapter": ended, "change": change}, {"control": trees.add(kept["control"], change)}

    def server(state: State, update: State, tally: Tally) -> State:
        # w + lr (mean - w), written from the mean on: with lr 1 it is the mean, bit for bit.
        rest = trees.subtract(update["adapter"], state["adapter"])
        share = len(tally.weights) / tally.population
        return {
            "adapter": trees.add(update["adapter"], rest, lr - 1),
            "control": trees.add(state["control"], update["change"], share),
        }

    return Algorithm(client=client, server=server, init=init, keep=keep, sends=("adapter", "control"), check=_check)


def _check(facts: Facts) -> None:
    one_rank("scaffold")(facts)
    if facts.optimizer != "sgd":
        raise JobError(
            f"scaffold corrects plain gradients, and with {facts.optimizer} (w - y) / (K lr) is not one: set "
            "local.optimizer to sgd, or choose fedavg"
        )
    if facts.momentum:
        raise JobError(
            "scaffold corrects plain gradients, and with momentum (w - y) / (K lr) is not one: set local.momentum to 0"
        )
    if facts.schedule != "constant" or facts.warmup:
        raise JobError(
            "scaffold divides by K steps of one learning rate: set local.schedule to constant and local.warmup to 0"
        )
    if not facts.even:
        raise JobError(
            "scaffold moves its control variate by the part of the population that a round asks, which takes for "
            "granted that all are asked equally often: set clients.sampler to uniform, poisson or round_robin"
        )
    if facts.per_round < facts.clients and not facts.uniform:
        raise JobError(
            "scaffold with a part of the clients in a round needs each to count once, or its control variate is not "
            "the mean of theirs: set pipeline to [weigh: {by: uniform}], or leave clients.per_round out"
        )
