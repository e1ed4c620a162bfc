"""Keep the base that was loaded last, for a next run over the same one: a suite loads each base once."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weft.core.task import Task
from weft.site.model import Base, network


@dataclass
class Resident:
    """The last base, as it was loaded; each run gets a model of its own over the same weights."""

    loads: int = 0
    """How often a base was read."""
    _held: dict[tuple[Any, ...], nn.Module] = field(default_factory=dict)

    def network(self, base: Base, task: Task, classes: tuple[str, ...], seed: int, tokenizer: Any) -> nn.Module:
        """Return the base model with the task's head; read it only where the one held is another.

        A new head and random weights come from the seed, so there they are another base. A quantised base is read anew.
        """
        if base.quantize:  # packed weights carry a state that a new parameter over them would lose
            self.loads += 1
            return network(base, task, classes, seed, tokenizer)
        drawn = seed if classes or base.random else None
        key = (base.path, base.revision, base.dtype, base.random, task.auto, len(classes), drawn)
        if key not in self._held:
            self._held.clear()  # before the next one is read: two bases need not fit
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._held[key] = network(base, task, classes, seed, tokenizer).to(device)
            self.loads += 1
        return _over(self._held[key])


def _over(net: nn.Module) -> nn.Module:
    """Return a new model over the same storage: what an adapter adds or puts in place stays in the new one."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    return copy.deepcopy(net, dict(shared))
