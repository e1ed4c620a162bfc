"""weigh: the mean of the updates, each client counted by its examples or all alike.

The weight stays an integer beside the update and multiplies it inside the exact sum, so nothing is rounded
before the one division at the end. Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep
Networks from Decentralized Data" (p_k = n_k / n); `uniform` is the usual choice under differential privacy.
"""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from weft.core.errors import JobError
from weft.core.sums import Sum
from weft.core.types import At, Parcel, Tally, Total, Transform, Wire


def weigh(by: Literal["examples", "uniform"] = "examples", cap: Annotated[int, Field(gt=0)] = 2**20) -> Transform:
    """Average the updates with integer weights.

    by: `examples` counts a client as often as it has training examples, `uniform` counts each once.
    cap: no client counts for more than this many examples.
    """

    def check(wire: Wire) -> Wire:
        if wire.weighted:
            raise JobError("a second weigh would divide twice; keep one")
        if wire.down:
            raise JobError("nothing is averaged on the way down; leave it out of downlink")
        most = cap if by == "examples" else 1
        if wire.length is not None and most != 1:
            raise JobError("clip.quantile is over clients that count alike; set weigh.by to uniform")
        return replace(wire, weighted=True, uniform=most == 1, heaviest=most)

    def client(at: At, parcel: Parcel) -> Parcel:
        return replace(parcel, weight=min(parcel.examples, cap) if by == "examples" else 1)

    def server(total: Total, tally: Tally) -> Total:
        return total.divided(tally.total) if isinstance(total, Sum) else total  # a ring divides by its own weights

    return Transform(check=check, client=client, server=server)
