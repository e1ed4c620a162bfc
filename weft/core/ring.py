"""The ring sum: clipped updates as one vector of integers mod 2^32, whose sum is exact and can be masked.

With n clients, a bound C on the joint L2 norm of an update, weights of at most w_max and f fraction bits, a client
sends x = round(2^f w / w_max u) for its update u, tensors in name order, then two fields: its weight, and its training
loss in the same scale as a weight. f is the greatest integer with n (C 2^f + 1) < 2^31, so the sum of all n fits into
the ring as a signed number and overflow is impossible. The mean is S w_max / (2^f W), with S and W the sums of x and
of the weights: integers below 2^53 and one division, the same bits on every machine.

Source of the form: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning".
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core import trees
from weft.core.errors import RunError
from weft.core.types import State, Wire

FIELDS = 2  # numbers after the coordinates: the weight, the loss
MOST_WEIGHT = 2**16  # of one client: more would leave an update of a usual weight few bits
MOST_LOSS = 64.0  # a loss of 63 nats or more counts as 63, and travels with 1 added
TAILS = 24  # standard deviations of the planned noise that have room: 12 of twice as much
_HALF = 2**31
_CHUNK = 2**20  # coordinates that are looked at together


@dataclass(frozen=True)
class Code:
    """How the updates of a round become integers: the same at every client and at the server."""

    clients: int
    norm: float
    most: int = 1
    noise: float = 0.0
    """Standard deviation of the sum's noise, as a part of `norm`."""

    @property
    def bits(self) -> int:
        """Return f, the fraction bits of a coordinate.

        >>> Code(10, 1.0).bits, Code(100, 1.0).bits, Code(10, 0.25).bits
        (27, 24, 29)
        """
        room = self.clients * self.norm + TAILS * self.noise * self.norm  # of a sum, in units of 2^f
        bits = math.frexp((_HALF - self.clients) / room)[1]
        while room * 2.0**bits + self.clients >= _HALF:
            bits -= 1
        return bits

    @property
    def unit(self) -> float:
        """Return 2^f."""
        return 2.0**self.bits

    @property
    def loss_unit(self) -> float:
        """Return what a loss of 1 is at the largest weight, a power of two."""
        return 2.0 ** (30 - math.ceil(math.log2(self.clients * MOST_LOSS)))


def code(wire: Wire, clients: int) -> Code:
    """Return the code of a pipeline for so many clients."""
    assert wire.norm is not None, "`ring` is checked to stand after `clip`"
    assert wire.heaviest, "`ring` is checked to stand after `weigh`"
    return Code(clients, wire.norm, wire.heaviest, wire.noise)


def size(layout: State) -> int:
    """Return the length of the vector of an update."""
    return sum(trees.count(tree) for tree in layout.values()) + FIELDS


def encode(update: State, weight: int, loss: float | None, code: Code) -> Tensor:
    """Return an update as int32 numbers mod 2^32, (coordinates + FIELDS,); raise RunError where it does not fit.

    With noise to come the update is first shortened by sqrt(d) / 2 units, the most that rounding can lengthen it by:
    then the integers themselves are no longer than C 2^f, which the noise is scaled by.
    """
    flat = trees.flatten(update)
    if bad := trees.not_finite(update):
        raise RunError(f"{bad} holds a NaN or an infinity; lower the learning rate or look at this client's data")
    if not 0 < weight <= code.most:
        raise RunError(f"a weight is from 1 to {code.most} here")
    if (length := trees.norm(flat)) > code.norm:
        raise RunError(f"an update of length {length:.6g} is longer than clip allows, {code.norm:.6g}")
    vector = torch.empty(size(update), dtype=torch.int32)
    factor, place = code.unit * weight / code.most * _shorter(vector.numel() - FIELDS, code), 0
    for value in flat.values():
        part = vector[place : place + value.numel()]
        part.copy_((value.double().flatten() * factor).round_())
        place += value.numel()
    told = 0.0 if loss is None else 1.0 + min(max(loss, 0.0), MOST_LOSS - 1.0)  # 0: nobody tells
    vector[place] = weight
    vector[place + 1] = round(told * code.loss_unit * weight / code.most)
    return vector


def _shorter(coordinates: int, code: Code) -> float:
    """Return the part of an update's length that rounding leaves room for; 1 without noise."""
    if not code.noise:
        return 1.0
    room = 1.0 - math.sqrt(coordinates) / 2 / (code.norm * code.unit)
    if room < 0.9:
        raise RunError("so many clients and so much noise leave too few bits for an update of this size")
    return room


class RingSum:
    """A running sum of vectors mod 2^32: memory for one vector, whatever the number of clients."""

    def __init__(self, code: Code, layout: State) -> None:
        self.code, self.layout = code, layout
        self.count = 0
        self.vector = torch.zeros(size(layout), dtype=torch.int32)

    @property
    def expected(self) -> State:
        """Return names, shapes and types of what a client sends."""
        return {"ring": {"vector": self.vector}}

    def add(self, state: State, weight: int) -> None:
        """Add one client's vector; its weight stands in the vector, not beside it."""
        if self.count == self.code.clients:
            raise RunError(f"a ring has room for the vectors of {self.code.clients} clients")
        self.vector += state["ring"]["vector"]  # int32 wraps around, which is the sum mod 2^32
        self.count += 1

    @property
    def weight(self) -> int:
        """Return the sum of the weights."""
        return int(self.vector[-FIELDS])

    @property
    def loss(self) -> float | None:
        """Return the weighted mean of the training losses; None where nobody told one."""
        told = float(self.vector[-1]) / self.code.loss_unit * self.code.most / self.weight
        return told - 1.0 if told else None

    def check(self) -> None:
        """Raise RunError for a sum that no updates within their bounds can have, such as one with a mask left on.

        A mask makes every number uniform: of length 2^31 sqrt(d / 3), far above any bound here.
        """
        code, squares, highest = self.code, 0.0, 0.0
        for chunk in self.vector[:-FIELDS].split(_CHUNK):
            numbers = chunk.double()
            squares += float(numbers.square().sum())
            highest = max(highest, float(numbers.abs_().max()))
        most, root = code.norm * code.unit, math.sqrt(len(self.vector) - FIELDS)
        noise = TAILS * code.noise * most
        sound = self.count <= self.weight <= self.count * code.most
        sound = sound and 0 <= int(self.vector[-1]) <= self.count * (code.loss_unit * MOST_LOSS + 1)
        sound = sound and highest <= self.count * (most + 1) + noise
        if not sound or math.sqrt(squares) > self.count * (most + root / 2) + noise / 12 * (root + 12):
            raise RunError(
                "the sum is larger than updates within their bounds can be: a mask is left on it (clients that got "
                "different adapters, or a false share), or a client sent something else"
            )

    def divided(self) -> State:
        """Return the weighted mean in the layout of an update, each number rounded once; raise RunError by `check`."""
        self.check()
        divisor, place = self.code.unit * self.weight, 0
        result: State = {}
        for part, tree in sorted(self.layout.items()):
            result[part] = {}
            for name, like in sorted(tree.items()):
                numbers = self.vector[place : place + like.numel()].double()
                result[part][name] = (numbers * self.code.most / divisor).float().view(like.shape)
                place += like.numel()
        return result
