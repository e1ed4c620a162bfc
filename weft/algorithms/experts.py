"""What ifca and task_experts share: several adapters at the server, of which each client trains one.

Client k sends what it trained in the place of its expert j(k), zeros in the place of the others, and which it was, as
a row of zeros and a one. Of the weighted means the server makes sum_{j(k) = j} p_k w_k / sum_{j(k) = j} p_k; an expert
that nobody trained stays as it is. So a sum is enough, and zeros take a bit a number on the wire. All experts travel
down.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weft.core.errors import JobError
from weft.core.types import Algorithm, Facts, State, Tally, Tensors, Work

MARK = "expert."
Choose = Callable[[Work, list[Tensors]], Tensor]
"""(work, the experts as received, once a client) -> the place of each client's expert, (clients,)."""


def routed(names: Sequence[str], choose: Choose, check: Callable[[Facts], None]) -> Algorithm:
    """Return a rule with one adapter for each name."""
    parts = tuple(MARK + name for name in names)

    def init(adapter: Tensors) -> State:
        return {part: {name: value.clone() for name, value in adapter.items()} for part in parts}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        chosen = choose(work, [received[part] for part in parts])
        rows = torch.arange(len(chosen))
        begun = {
            name: torch.stack([received[part][name] for part in parts])[chosen, rows] for name in received[parts[0]]
        }
        ended = work.train(begun)
        update: State = {part: _of(ended, chosen == place) for place, part in enumerate(parts)}
        share = torch.nn.functional.one_hot(chosen, len(parts)).float()
        return {**update, "share": {"share": share}}, {"chosen": {"place": chosen.float().unsqueeze(1)}}

    def server(state: State, update: State, tally: Tally) -> State:
        shares = update["share"]["share"].tolist()
        return {
            part: {name: value / share for name, value in update[part].items()} if share > 0 else state[part]
            for part, share in zip(parts, shares, strict=True)
        }

    def keep(adapter: Tensors) -> State:
        return {"chosen": {"place": torch.zeros(1)}}

    def serve(state: State, kept: State, initial: Tensors) -> Tensors:
        return state[parts[int(kept["chosen"]["place"])]]

    def exports(state: State, initial: Tensors) -> dict[str, Tensors]:
        return {name: state[part] for name, part in zip(names, parts, strict=True)}

    return Algorithm(client, server, init, keep, serve, sends=parts, exports=exports, check=check, personal=True)


def _of(tensors: Tensors, mine: Tensor) -> Tensors:
    """Return a stack of clients with zeros for all but those that are meant; mine: (clients,)."""
    return {
        name: torch.where(mine.view(-1, *[1] * (value.dim() - 1)), value, torch.zeros(()))
        for name, value in tensors.items()
    }


def no_noise(name: str, facts: Facts) -> None:
    """Refuse pipelines that take the zeros of experts that a client did not train for updates."""
    if facts.noise or "delta" in facts.pipeline or "clip" in facts.pipeline:
        raise JobError(
            f"{name} sends zeros in the place of the experts that a client did not train, which clipping and noise "
            "would take for updates: leave clip, delta and noise out of the pipeline, or choose local_heads"
        )
