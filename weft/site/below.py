"""The frozen layers below the first trained one: what they make of an example is computed once and kept.

Nothing below an adapter changes while it is trained, so that the same numbers reach it in every epoch and round. They
are computed for each example alone, in packed blocks only: whatever was kept, and whatever stood beside it, a client
ends with the same bits. That makes the first pass over the data slower, so that it is done where all clients train in
each round and pass over their data more than twice. No more is kept than the base takes; what does not fit is computed
at every step.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.task import Batch
from weft.site import packing
from weft.site.lanes import Lanes

LEAST = 64 << 20  # bytes
_HEADS = re.compile(r"(^|\.)(score|classifier|pre_classifier|pooler|lm_head)(\.|$)")  # they stand above all layers


class _Enough(Exception):
    """The forward pass has come as far as it is wanted."""


class Kept:
    """What reaches the first trained layer, by an example's tokens; shared by the threads that train over one base."""

    def __init__(self, base: int) -> None:
        """Keep no more than a base of so many bytes takes."""
        self.most, self.bytes = max(LEAST, base), 0
        self.states: dict[bytes, Tensor] = {}
        self._lock = threading.Lock()

    def keep(self, name: bytes, states: Tensor) -> None:
        """Keep what fits; what is there stays, since every epoch asks for all in turn."""
        with self._lock:
            if name not in self.states and self.bytes + states.nbytes <= self.most:
                self.states[name] = states
                self.bytes += states.nbytes

    def let_go(self) -> None:
        """Free all that is kept, and keep nothing more."""
        with self._lock:
            self.most = self.bytes = 0
            self.states = {}


@dataclass(frozen=True)
class Below:
    """The layers of one model below its adapter; none where there is one in the first."""

    layers: Sequence[nn.Module]
    kept: Kept

    @contextmanager
    def over(self, net: Any, batch: Batch) -> Iterator[None]:
        """Let a model begin behind these layers with a packed batch, which is on the CPU."""
        if not self.layers:
            yield
            return
        parts = [self._reached(net, words) for words in batch["input_ids"][0].split(batch["lengths"])]
        reached = torch.cat(parts, 1)
        for layer in self.layers:
            layer.forward = lambda *args, **kwargs: reached
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _reached(self, net: Any, words: Tensor) -> Tensor:
        """Return what the layers make of one example, (1, tokens, hidden)."""
        name = words.numpy().tobytes()
        states = self.kept.states.get(name)
        if states is None:
            states = _alone(net, self.layers[-1], words)
            self.kept.keep(name, states)
        return states


@torch.no_grad()
def _alone(net: Any, last: nn.Module, words: Tensor) -> Tensor:
    """Return what the layers up to the last one make of one example, (1, tokens, hidden); words: on the CPU."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out)
        raise _Enough

    hook = last.register_forward_hook(stop)
    device = next(last.parameters()).device
    ids, positions = words[None].to(device), torch.arange(len(words), device=device)[None]
    try:
        with suppress(_Enough), packing.packed(net, Lanes(tokens=[len(words)], lengths=[len(words)])):
            net(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def layers_below(net: nn.Module) -> list[nn.Module]:
    """Return the layers of a model below all trained modules, which stand in one list of layers or are its head.

    None where something below draws masks, where activations are computed again to save memory, or where a module
    is trained whose place is not known.
    """
    paths = {module: path for path, module in net.named_modules()}
    trained = [paths[module] for module in paths if any(p.requires_grad for p in module.parameters(recurse=False))]
    owners = [path for path in trained if not _HEADS.search(path)]
    found = [re.match(r"(.*?)\.(\d+)\.", f"{path}.") for path in owners]
    places = {(match[1], int(match[2])) for match in found if match}
    stacks = {above for above, _ in places}
    again = any(getattr(module, "gradient_checkpointing", False) for module in net.modules())
    if again or len(stacks) != 1 or not all(found):
        return []
    (above,), first = stacks, min(number for _, number in places)
    stack: Any = net.get_submodule(above)
    if not isinstance(stack, nn.ModuleList) or any(_draws(module) for module in _outside(net, stack[first:])):
        return []
    return list(stack[:first])


def _outside(net: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    inside = {module for layer in layers for module in layer.modules()}
    return [module for module in net.modules() if module not in inside]


def _draws(module: nn.Module) -> bool:
    """Tell whether a module draws masks, or leaves out layers by chance as OPT can."""
    return (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "layerdrop", 0) > 0
