"""fedbuff: the server steps by the mean update of every `buffer` replies, while others are still at work.

D_k = w_k - w_v is the difference to the state v that client k began with; w <- w + lr sum_k p_k s(t - v) D_k over the
buffer, p_k each client's part of the buffer's weights (1/buffer with `weigh: {by: uniform}`, as in the paper): divided
by the weights and not by the sum of the discounted ones. Nguyen et al. 2022, arXiv:2106.06639. `clients.per_round`
clients are at work at any time; who replies is replaced at once by another client, drawn uniformly among those that are
neither at work nor in the buffer, which begins with the server's state of that moment. So no client is twice in one
buffer, however fast it is. A round is a step of the server.
"""

from typing import Annotated

from pydantic import Field

from weft.core.pace import Pace
from weft.paces.staleness import Kind, staleness_factor


def fedbuff(
    buffer: Annotated[int, Field(gt=0)] = 10,
    staleness: Kind = "polynomial",
    exponent: Annotated[float, Field(ge=0)] = 0.5,
    lr: Annotated[float, Field(gt=0)] = 1.0,
) -> Pace:
    """Step after every `buffer` replies.

    buffer: replies that make a step. staleness: how an old update is discounted: (1 + staleness)^-exponent, not at
    all, or not up to four steps and steeply after. exponent: of the first. lr: the server's learning rate.
    """
    return Pace(buffer, staleness_factor(staleness, exponent, lr))
