"""random_mask: in each round the same part of all numbers travels, drawn by the public seed, so no places are sent.

All clients of a round send the same places; so it can stand before secure aggregation, which topk cannot. Konečný et
al. 2016, "Federated Learning: Strategies for Improving Communication Efficiency" (random mask), here with error
feedback in place of scaling up.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.core import keys, trees
from weft.core.types import At, State, Tally, Total, Transform, Wire
from weft.transforms.error_feedback import coding, differences, unbounded
from weft.transforms.topk import chosen


def random_mask(fraction: Annotated[float, Field(gt=0, le=1)] = 0.1, feedback: bool = True) -> Transform:
    """Send a part of all numbers, others in each round.

    fraction: the part of all numbers that travels. feedback: add what was left out to the next update.
    """

    def encode(at: At, update: State) -> State:
        vector = trees.joined(update)
        return {"random_mask": {"values": vector[places(at, len(vector), fraction)]}} if len(vector) else update

    def decode(at: At | Tally, update: State) -> State:
        if "random_mask" not in update:
            return update
        whole = torch.zeros(sum(tensor.numel() for tensor in trees.flatten(at.form).values()))
        whole[places(at, len(whole), fraction)] = update["random_mask"]["values"]
        return trees.parted(whole, at.form)

    def server(total: Total, tally: Tally) -> Total:
        return decode(tally, total) if isinstance(total, dict) else total  # where replies were hidden in a sum

    def check(wire: Wire) -> Wire:
        differences(wire)
        return replace(unbounded(wire, feedback), encoded="random_mask")

    client = coding(encode, decode, feedback)
    return Transform(check=check, client=client, arrive=decode, server=server, remembers=feedback)


def places(at: At | Tally, numbers: int, fraction: float) -> Tensor:
    """Return the places of a round, in order."""
    drawn = keys.permutation(numbers, at.seed, at.round, "random_mask")[: chosen(numbers, fraction)]
    return torch.tensor(sorted(drawn))
