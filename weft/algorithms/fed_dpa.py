"""fed_dpa: a global and a local pair of factors, both at work for each client: W0 x + (1 - a) global x + a local x.

In each round a client first trains its local pair beside the frozen global one, at these weights, then the global pair
alone, which fedavg averages. Yang et al. 2024, "Dual-Personalizing Adapter for Federated Foundation Models",
arXiv:2403.19211, its FedDPA-T. The paper weighs the two anew for each question, by its likeness to the client's
records; here the weight is one number, so that both are one plain peft adapter of twice the rank. Weight 0 leaves the
adapter of fedavg. The local pair never travels; a client that was never asked uses the global one alone. Training takes
twice the time. With sgd the local B steps by the gradient of its own numbers; with adamw by lr / a, as of a B.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from weft.algorithms.fedavg import fedavg
from weft.algorithms.refusals import low_rank as refuse
from weft.core import low_rank, trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, Facts, Gradient, State, Tensors, Work


def fed_dpa(weight: Annotated[float, Field(ge=0, lt=1)] = 0.5) -> Algorithm:
    """Train a global pair of factors by fedavg, and beside it a local one a client.

    weight: of the local pair, a; the global one has the rest.
    """

    def keep(adapter: Tensors) -> State:
        return {"own": _scaled(low_rank.factors(adapter), 0.0)}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        whole, own = received["adapter"], kept["own"]
        if weight:
            side = _scaled(low_rank.factors(whole), 1 - weight)
            start = trees.merged(whole, low_rank.above(side, _scaled(own, weight)))
            ended = low_rank.below(side, work.train(start, _local(side, weight)))
            own = _scaled(low_rank.factors(ended), 1 / weight)
        return {"adapter": work.train(whole)}, {"own": own}

    def serve(state: State, kept: State, initial: Tensors) -> Tensors:
        whole, own = state["adapter"], kept["own"]
        if not any(own[b].any() for b, _ in low_rank.pairs(own)):
            return whole
        return trees.merged(whole, low_rank.above(_scaled(low_rank.factors(whole), 1 - weight), _scaled(own, weight)))

    def check(facts: Facts) -> None:
        refuse("fed_dpa", still=True, anew=True)(facts)
        if facts.dp and weight:
            raise JobError(
                "fed_dpa trains twice on the same records in a round, and local.dp accounts for once: leave local.dp "
                "out, or choose fedsa_lora"
            )

    return replace(fedavg(), client=client, keep=keep, serve=serve, check=check, personal=True)


def _scaled(factors: Tensors, part: float) -> Tensors:
    """Return factors whose product is `part` times as large."""
    return {name: value * part if low_rank.B in name else value for name, value in factors.items()}


def _local(side: Tensors, weight: float) -> Gradient:
    """Return a gradient that keeps the global ranks and all plain tensors, and steps a B as B would have stepped."""
    rests = low_rank.frozen(side)

    def gradient(grads: Tensors, params: Tensors, rows: Tensor) -> Tensors:
        kept = rests(grads, params, rows)
        return {
            name: value * 0 if not low_rank.axis(name) else value * weight**2 if low_rank.B in name else value
            for name, value in kept.items()
        }

    return gradient
