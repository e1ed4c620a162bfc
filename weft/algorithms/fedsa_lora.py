"""fedsa_lora: A is shared and averaged, B and the heads stay at their client; every client has its own dW = B_k A.

A learns what is common and B what is a client's own. Guo et al. 2025, arXiv:2410.01463. Up and down rank * in a layer;
nothing of B travels. A client that was never asked uses the shared A with the first B, which is zero.
"""

from dataclasses import replace

from weft.algorithms.local_heads import keeping
from weft.algorithms.refusals import low_rank as refuse
from weft.core import low_rank
from weft.core.types import Algorithm


def fedsa_lora() -> Algorithm:
    """Average A; train B and all other tensors at each client for itself."""
    return replace(keeping(lambda name: low_rank.A not in name), check=refuse("fedsa_lora"))
