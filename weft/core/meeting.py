"""What a round needs of secure aggregation: clients that agree on keys first, a sum that is opened last."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from weft.core.types import Link, Order


def threshold(clients: int) -> int:
    """Return how many clients of a round must stay to the end: 2n/3, rounded down, and one.

    Then 2 t > n + c for every number c < n/3 of clients that collude with a lying server: it cannot gather t shares of
    both kinds. A third of the clients may drop out.

    >>> [threshold(n) for n in (3, 4, 5, 7, 10, 20, 50, 100)]
    [3, 3, 4, 5, 7, 14, 34, 67]
    """
    return 2 * clients // 3 + 1


class Meeting(Protocol):
    """One round of secure aggregation, once its clients have agreed on keys."""

    @property
    def order(self) -> Order:
        """Return the order for those who have keys, with what each needs for its masks."""

    @property
    def lost(self) -> Mapping[str, str]:
        """Return who of the cohort has no keys, and why."""

    @property
    def traffic(self) -> Mapping[str, tuple[int, int]]:
        """Return client -> bytes up and down of its messages, but for what the order carries."""

    def finish(self, link: Link, survivors: Sequence[str], vector: Tensor) -> dict[str, Any]:
        """Take the masks off the sum of the survivors' vectors, in place; return what the journal keeps."""


class Secure(Protocol):
    """The server's half of secure aggregation."""

    def begin(self, link: Link, order: Order) -> Meeting:
        """Let the clients of an order agree on keys."""
