"""Lift a plain peft model: the modules that read a trained tensor learn to read one with a client axis.

Every trained tensor gets a leading axis of K clients, in place; the module that owns it (or the tuner layer around
it) gets a forward of its own for as long as the block trains; all other code of transformers and peft runs as it
is on the rows of all clients. Three tiers: `fast` (one batched product: linear, Conv1D, embedding), `vmap` over one
tuner layer, and a loop over the clients for that layer alone. State names stay peft's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vmap
from torch.nn import functional

from weft.core.products import frozen
from weft.site.lanes import Lanes
from weft.site.lean import lean

_MIX = 0x9E3779B97F4A7C15  # odd, so that module numbers spread over all seeds
_PLAIN = ("Linear", "Linear8bitLt", "Linear4bit")  # peft's LoRA layers whose factors are plain linear layers
SMALL = 400  # numbers times columns below which torch's bmm computes by itself, and rounds otherwise than mm
ENCODER = "prompt_encoder."  # where a peft model keeps what its virtual tokens are computed from


def virtual_tokens(net: Any) -> int:
    """Return how many virtual tokens peft puts in front of each row: prompts, p-tuning and prefixes."""
    config = getattr(net, "active_peft_config", None) if hasattr(net, "get_base_model") else None
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def inserts_tokens(net: Any) -> bool:
    """Tell whether the virtual tokens are inputs of the first layer; a prefix is a cache of every layer."""
    return virtual_tokens(net) > 0 and net.active_peft_config.peft_type != "PREFIX_TUNING"


class _Products(torch.autograd.Function):
    """Rows (K, n, in) times weights (K, in, out), each gradient in the form that a linear layer alone computes it in.

    torch's own gradient of `bmm` is the transposed product, which rounds otherwise: a client would end elsewhere in
    company than alone.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.bmm(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        to_rows = torch.bmm(grad, weight.mT) if ctx.needs_input_grad[0] else None
        return to_rows, torch.bmm(grad.mT, rows).mT if ctx.needs_input_grad[1] else None


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, lanes: Lanes) -> Tensor:
    """Apply weight (K, in, out), or (in, out) where only the bias is trained."""
    pieces = lanes.split(x)
    unlike = len({len(piece) for piece in pieces}) > 1
    if unlike or (len(pieces) == lanes.clients and pieces[0].numel() * weight.shape[-1] < SMALL):
        weights = weight.unbind(0) if weight.dim() == 3 else [weight] * len(pieces)
        biases = [None] * len(pieces) if bias is None else bias.unbind(0) if bias.dim() == 2 else [bias] * len(pieces)
        parts = [functional.linear(p, w.mT, b) for p, w, b in zip(pieces, weights, biases, strict=True)]
        return lanes.join(parts, x)
    rows = x.reshape(lanes.clients, -1, x.shape[-1])
    y = _Products.apply(rows, weight) if weight.dim() == 3 else rows @ weight
    if bias is not None:
        y = y + (bias.unsqueeze(1) if bias.dim() == 2 else bias)
    return y.view(*x.shape[:-1], -1)


def _linear(module: nn.Module, x: Tensor, lanes: Lanes) -> Tensor:
    return _matmul(x, module.weight.mT, module.bias, lanes)  # type: ignore[arg-type]


def _conv1d(module: nn.Module, x: Tensor, lanes: Lanes) -> Tensor:
    return _matmul(x, module.weight, module.bias, lanes)  # type: ignore[arg-type]


def _embed(module: nn.Module, ids: Tensor, lanes: Lanes) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if lanes.rows and ids.dim() == 2 and len(ids) == 1:
        ids = ids.expand(lanes.rows, -1)  # one row of positions for all rows: each client reads its own table
    pieces = lanes.split(ids.unsqueeze(-1))
    parts = [
        functional.embedding(piece[..., 0], table, module.padding_idx)  # type: ignore[arg-type]
        for piece, table in zip(pieces, weight.unbind(0), strict=True)
    ]
    return torch.cat(parts).view(*ids.shape, -1)


def _fast_rules() -> dict[type, Callable[[nn.Module, Tensor, Lanes], Tensor]]:
    from transformers.pytorch_utils import Conv1D

    return {nn.Linear: _linear, Conv1D: _conv1d, nn.Embedding: _embed}


class _Call(nn.Module):
    """Reaches the forward that a module had before it was lifted."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.m).forward(self.m, *args, **kwargs)


class Lift:
    """The lifted forwards of one model, put in place for a block and taken away after it."""

    def __init__(self, net: nn.Module, places: dict[str, list[tuple[nn.Module, str]]]) -> None:
        self.lanes = Lanes()
        self.looped: set[nn.Module] = set()
        self.prompts: nn.Module | None = net if inserts_tokens(net) else None
        inside = {name: at for name, at in places.items() if not (self.prompts and name.startswith(ENCODER))}
        targets = _targets(net, inside)
        self.forwards = {module: self._forward(module, names) for module, names in targets.items()}
        drops = [m for m in net.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        own = {below for module, names in targets.items() for below in (module.modules() if names else [module])}
        head = getattr(net, "get_output_embeddings", lambda: None)()  # goes with its loss, in pieces: weft.tasks.head
        known = (lean(net) | frozen(net)).items()
        self.lean = {module: forward for module, forward in known if module not in own and module is not head}
        self.pictured = _pictured(net)
        self.dropouts: dict[nn.Module, Callable[..., Tensor]] = {
            module: self._dropout(module, number) for number, module in enumerate(drops)
        }

    @contextmanager
    def over(self, lanes: Lanes, lifted: bool) -> Iterator[None]:
        """Let the model see this block; with `lifted` false (one client) only dropout is taken over."""
        self.lanes = lanes
        with _standing_in(self.dropouts | self.lean | self.forwards if lifted else self.dropouts):
            if self.prompts and lifted:
                self.prompts.get_prompt = self._prompt  # type: ignore[assignment]
            try:
                yield
            finally:
                if self.prompts and lifted:
                    del self.prompts.get_prompt

    def leaner(self) -> AbstractContextManager[None]:
        """Let the model compute what it does anyway in less time, for one adapter: nothing is lifted."""
        return _standing_in(self.lean)

    def _prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
        """Stand for peft's get_prompt, which computes one row and repeats it: one row a client, (rows, tokens, dim)."""
        net: Any = self.prompts
        if batch_size != self.lanes.rows:
            raise NotImplementedError(f"virtual tokens for {batch_size} rows, the block has {self.lanes.rows}")
        encoder = net.prompt_encoder[net.active_adapter]
        own = dict(encoder.named_parameters())
        tokens = net.prompt_tokens[net.active_adapter].to(encoder.embedding.weight.device).unsqueeze(0)
        rows = [
            functional_call(encoder, {name: value[k] for name, value in own.items()}, (tokens,))
            for k in range(self.lanes.clients)
        ]
        return torch.cat(rows).repeat_interleave(batch_size // self.lanes.clients, 0)

    def _forward(self, module: nn.Module, names: Sequence[str] | None) -> Callable[..., Tensor]:
        if names is None:
            rule = _fast_rules()[type(module)]
            return lambda x: rule(module, x, self.lanes)
        return self._generic(module, names)

    def _generic(self, module: nn.Module, names: Sequence[str]) -> Callable[..., Tensor]:
        call = _Call(module)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own = dict(module.named_parameters(remove_duplicate=False))
            stacked = {f"m.{name}": own[name] for name in names}
            pieces = self.lanes.split(x)
            more = any(isinstance(value, Tensor) for value in [*args, *kwargs.values()])
            several = len(pieces) > 1 and len({len(piece) for piece in pieces}) == 1
            if several and not more and module not in self.looped:
                try:
                    run = vmap(
                        lambda p, rows: functional_call(call, p, (rows, *args), kwargs),
                        randomness="different",
                    )
                    return self.lanes.joined(run(stacked, torch.stack(pieces)).flatten(0, 1), x)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, NotImplementedError):
                    self.looped.add(module)
            rows = [
                functional_call(
                    call,
                    {n: t[k] for n, t in stacked.items()},
                    (piece, *(self._part(value, k) for value in args)),
                    {key: self._part(value, k) for key, value in kwargs.items()},
                )
                for k, piece in enumerate(pieces)
            ]
            return self.lanes.join(rows, x)

        return forward

    def _part(self, value: Any, client: int) -> Any:
        """Return one client's rows of an argument beside the input, such as positions."""
        return self.lanes.split(value)[client] if isinstance(value, Tensor) and value.dim() else value

    def _dropout(self, module: nn.Dropout, number: int) -> Callable[[Tensor], Tensor]:
        """Draw each client's mask from its own seed and the module's number: the same with and without company."""

        def forward(x: Tensor) -> Tensor:
            if not module.training:
                return x
            if self.lanes.rows and self.lanes.flat(x):
                return forward(x.view(self.lanes.rows, -1, x.shape[-1])).view_as(x)
            whole = self.lanes.padded(x)
            seeds = [seed + number * _MIX for seed in self.lanes.seeds]
            own = self.lanes.own if whole else []
            if module in self.pictured:  # patches are equally many in every row: none is padding
                own = [(rows, x.shape[1]) for rows, _ in own]
            masks = [
                _mask(piece, module.p, seeds[k], own[k] if own else None) for k, piece in enumerate(self.lanes.split(x))
            ]
            return x * self.lanes.join(masks, x)

        return forward


@contextmanager
def _standing_in(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Let modules have other forwards for a while."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _mask(piece: Tensor, p: float, seed: int, own: tuple[int, int] | None) -> Tensor:
    """Draw a client's mask over its own rows and its own longest, so that padding draws nothing."""
    generator = torch.Generator(piece.device)
    generator.manual_seed(seed & (2**63 - 1))
    shape = list(piece.shape)
    if own:
        shape[:2] = own if piece.dim() > 2 else [own[0], *shape[1:2]]
    drawn = torch.empty(shape, device=piece.device, dtype=piece.dtype).bernoulli_(1 - p, generator=generator)
    mask = torch.ones_like(piece)
    inside = tuple(slice(0, min(sizes)) for sizes in zip(shape, piece.shape, strict=True))  # a decoder's are shorter
    mask[inside] = drawn[inside] / (1 - p)
    return mask


def _pictured(net: nn.Module) -> set[nn.Module]:
    """Return the modules of a tower that reads pictures: their rows have patches, and not a text's tokens."""
    found: set[nn.Module] = set()
    for module in net.modules():  # outer models come before those inside them
        reads = getattr(module, "main_input_name", None)
        if reads == "pixel_values":
            found.update(module.modules())
        elif reads is not None:
            found.difference_update(module.modules())
    return found


def _targets(net: nn.Module, places: dict[str, list[tuple[nn.Module, str]]]) -> dict[nn.Module, list[str] | None]:
    """Return module to lift -> None for the fast tier, else the names of its trained tensors below it."""
    fast, modules = _fast_rules(), dict(net.named_modules(remove_duplicate=False))
    paths = {module: path for path, module in modules.items()}
    lift: dict[nn.Module, list[str] | None] = {}
    for owners in places.values():
        for owner, leaf in owners:
            path = paths[owner]
            site = _site(path, modules, owner, fast)
            if site is None:
                lift[owner] = None
            else:
                names = lift.setdefault(modules[site], [])
                assert names is not None
                names.append(f"{path}.{leaf}"[len(site) :].lstrip("."))
    return _absorbed(lift, paths, places)


def _absorbed(
    lift: dict[nn.Module, list[str] | None], paths: dict[nn.Module, str], places: dict[str, list[tuple[nn.Module, str]]]
) -> dict[nn.Module, list[str] | None]:
    """Lift a module whole where its forward reads a trained tensor and calls lifted modules, as ViT's embeddings do."""
    trained = [f"{paths[owner]}.{leaf}" for owners in places.values() for owner, leaf in owners]
    outer = {paths[module] for module, names in lift.items() if names is not None}

    def inside(path: str, above: str) -> bool:
        return path != above and path.startswith(f"{above}." if above else "")

    kept: dict[nn.Module, list[str] | None] = {}
    for module, names in lift.items():
        path = paths[module]
        if any(inside(path, above) for above in outer):
            continue
        below = any(inside(paths[other], path) for other in lift) if names is not None else False
        kept[module] = [name[len(path) :].lstrip(".") for name in trained if inside(name, path)] if below else names
    return kept


def _site(path: str, modules: dict[str, nn.Module], owner: nn.Module, fast: dict[type, Any]) -> str | None:
    """Return the path of the module to lift for a trained tensor's owner; None: the owner itself, fast."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    chain = [path.rsplit(".", i)[0] if i else path for i in range(path.count(".") + 1)] + [""]
    tuner = next((p for p in chain if isinstance(modules[p], BaseTunerLayer)), None)
    layer = modules[tuner] if tuner is not None else None
    plain = (
        layer is None
        or getattr(layer, "lifts_by_leaf", False)
        or (isinstance(layer, LoraLayer) and type(layer).__name__ in _PLAIN and not layer.lora_variant)
    )
    if plain and type(owner) in fast:
        return None
    return tuner if tuner is not None else next(p for p in chain if type(modules[p]).forward is not nn.Module.forward)
