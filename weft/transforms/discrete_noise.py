"""discrete_noise: distributed differential privacy, each client adding its share of the noise inside the ring.

The sum of the clients' discrete Gaussian numbers has standard deviation `multiplier` times the norm of `clip`, and
nobody sees the sum without it. Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation". A share is planned for the fewest clients whose noise can be counted on: those that
must stay to the end, without `colluders` who know their own. With all of them there is more noise than promised.

The numbers come from the client's secret and the vector itself: the same vector gets the same noise when a round is
done again, so there is no second one to average with, and another vector gets another.
"""

import hashlib
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.core import keys
from weft.core.errors import JobError, RunError
from weft.core.meeting import threshold
from weft.core.ring import FIELDS, code
from weft.core.types import At, Parcel, Transform, Wire
from weft.transforms.discrete_gaussian import Stream, gaussian


def discrete_noise(multiplier: Annotated[float, Field(gt=0)], colluders: Annotated[int, Field(ge=0)]) -> Transform:
    """Add each client's share of the noise of the sum.

    multiplier: standard deviation of the sum's noise, in lengths of clip.norm.
    colluders: clients whose noise may be known to who looks at the sum.
    """

    def check(wire: Wire) -> Wire:
        if wire.encoded not in ("ring", "discrete_noise") or wire.norm is None:
            raise JobError("its shares are integers of a ring and must be hidden; put it between ring and mask")
        if wire.noise:
            raise JobError("there is noise already; keep one")
        if not wire.uniform:
            raise JobError("the noise is for clients that count alike; set weigh: {by: uniform}")
        return replace(wire, noise=multiplier, colluders=colluders, encoded="discrete_noise")

    def client(at: At, parcel: Parcel) -> Parcel:
        if not at.secret:
            raise RunError("this client has no secret to draw its noise from")
        known, counted = code(at.wire, len(at.cohort)), threshold(len(at.cohort)) - colluders
        vector = parcel.update["ring"]["vector"]
        deviation = multiplier * known.norm * known.unit / counted**0.5
        return replace(parcel, update={"ring": {"vector": noised(vector, deviation, _key(at, vector))}})

    return Transform(check=check, client=client)


def _key(at: At, vector: Tensor) -> bytes:
    content = hashlib.sha256(vector.numpy().data).hexdigest()
    return keys.secret(at.secret, "discrete noise", at.round, at.client, content)


def noised(vector: Tensor, deviation: float, key: bytes) -> Tensor:
    """Return the vector with noise on each coordinate mod 2^32; the training loss, which none covers, is left out."""
    result = vector.clone()
    noise = torch.from_numpy(gaussian(Stream(key), deviation, len(vector) - FIELDS))
    result[:-FIELDS] += ((noise + 2**31) % 2**32 - 2**31).to(torch.int32)
    result[-1] = 0
    return result
