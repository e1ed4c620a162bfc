"""flasc: only the largest entries of the factors travel down, and only the largest of what changed travels up.

Down: the `download` part of all factors' entries with the largest magnitude, the others zero. The client trains all
entries from there. Up: the `upload` part of its change since that start with the largest magnitude. The server holds
all entries and steps with the mean change by Adam, as fedadam does. Kuo et al. 2024, arXiv:2406.05233. What is drawn
anew in each round is which entries travel. Heads travel whole. Where at least half of a tensor is zero, a zero takes
one bit on the wire (links/thin.py): 0.25 of the entries take 0.28 of the bytes.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.algorithms.fedadam import fedadam
from weft.algorithms.refusals import low_rank as refuse
from weft.core import low_rank, trees
from weft.core.types import Algorithm, State, Tally, Tensors, Work

Density = Annotated[float, Field(gt=0, le=1)]


def flasc(
    download: Density = 0.25,
    upload: Density = 0.25,
    lr: Annotated[float, Field(gt=0)] = 0.005,
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99,
    tau: Annotated[float, Field(gt=0)] = 1e-3,
) -> Algorithm:
    """Send the largest entries of the factors down and the largest changes up; step by Adam.

    download, upload: parts of the factors' entries that travel. lr, beta1, beta2, tau: as in fedadam.
    """
    dense = fedadam(lr, beta1, beta2, tau)

    def sparse(adapter: Tensors) -> Tensors:
        return trees.pick(largest(trees.expand(adapter, 1), download), 0)

    def init(adapter: Tensors) -> State:
        return {**dense.init(adapter), "sent": sparse(adapter)}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        change = trees.subtract(work.train(received["sent"]), received["sent"])
        return {"change": largest(change, upload)}, kept

    def server(state: State, update: State, tally: Tally) -> State:
        after = dense.server(state, {"adapter": trees.add(state["adapter"], update["change"])}, tally)
        return {**after, "sent": sparse(after["adapter"])}

    def effective(received: State, update: State, initial: Tensors) -> Tensors:
        return trees.add(received["sent"], update["change"])

    return replace(
        dense,
        client=client,
        server=server,
        init=init,
        effective=effective,
        sends=("sent",),
        serves=("adapter",),
        check=refuse("flasc"),
        stale=False,
    )


def largest(tensors: Tensors, density: float) -> Tensors:
    """Return each client's tensors, (clients, *shape), with all entries of its factors zero but the largest.

    floor(density * entries) of all factors together stay, at least one.
    """
    parts = low_rank.factors(tensors)
    flat = torch.cat([part.flatten(1) for part in parts.values()], 1)
    count = max(1, int(flat.shape[1] * density + 1e-9))  # 0.29 * 100 is 28.999999999999996
    places = flat.abs().topk(count, 1).indices
    kept: Tensor = torch.zeros_like(flat).scatter(1, places, flat.gather(1, places))
    pieces = kept.split([part[0].numel() for part in parts.values()], 1)
    return dict(tensors) | {
        name: piece.view_as(part) for (name, part), piece in zip(parts.items(), pieces, strict=True)
    }
