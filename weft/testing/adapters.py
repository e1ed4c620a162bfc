"""What every adapter must pass, on a tiny Llama or another model that it can be put on."""

import tempfile
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.folder import adapter_files, load_adapter
from weft.core.types import Adapter, Tensors
from weft.site.model import peft_config, peft_names
from weft.testing.sound import bits, require, run_all, running
from weft.testing.tiny import model

MakeAdapter = Callable[[], Adapter]
MakeModel = Callable[[], nn.Module]
IDS = torch.tensor([[1, 40, 41, 42, 43, 2], [1, 50, 40, 61, 7, 8]])


def _attached(make: MakeAdapter, base: nn.Module, seed: int = 7) -> nn.Module:
    with running("the adapter cannot be attached to a model"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a name that is being renamed
        return make().attach(base, "CAUSAL_LM", seed).eval()


def _logits(net: nn.Module) -> Tensor:
    """Return the outputs of the text's own positions, virtual tokens aside."""
    with torch.no_grad():
        result: Tensor = net(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return result[:, -IDS.shape[1] :]


def _trainable(net: nn.Module) -> Tensors:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def _values(net: nn.Module) -> Tensors:
    return {name: p.detach().clone() for name, p in sorted(_trainable(net).items())}


def _move(net: nn.Module) -> nn.Module:
    """Take an attached model away from its start, where B = 0 would hide a mistake."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in _trainable(net).values():
            value += 0.1 * torch.randn(value.shape, generator=draw)
    return net


def check_frozen(make: MakeAdapter, base: MakeModel = model) -> None:
    """Train something, but no tensor of the base. Methods that train the base's own may waive it."""
    plain = base()
    own = {id(p): name for name, p in plain.named_parameters()}
    trained = _trainable(_attached(make, plain))
    require(bool(trained), "the adapter leaves nothing to train")
    loose = [own[id(p)] for p in trained.values() if id(p) in own]
    require(not loose, f"the base's tensor {', '.join(loose)} is left trainable")


def check_base(make: MakeAdapter, base: MakeModel = model) -> None:
    """Leave the base bit for bit as it was after a training step that changes the adapter.

    Methods that train the base's own tensors may waive it.
    """
    plain = base()
    own = dict(plain.named_parameters())
    net = _attached(make, plain)
    before, first = bits(own), bits(_trainable(net))
    with running("the adapter cannot be trained"):
        net(input_ids=IDS, labels=IDS).loss.backward()
        torch.optim.SGD(_trainable(net).values(), lr=0.1).step()
    require(bits(_trainable(net)) != first, "a training step changes nothing")
    changed = [name for name, p in own.items() if bits(p) != before[name]]
    require(not changed, f"a training step changes the base's tensor {', '.join(changed)}")


def check_round_trip(make: MakeAdapter, base: MakeModel = model) -> None:
    """Give the same outputs once the adapter's folder was put on a plain base, every trainable tensor in it."""
    net = _attached(make, base())
    first = _values(net)
    _move(net)
    with running("the adapter's folder cannot be written and read"), tempfile.TemporaryDirectory() as folder:
        described: dict[str, Any] = {"adapter": first, "peft_names": peft_names(net), "peft_config": _config(net)}
        for name, content in adapter_files(make(), _values(net), described).items():
            (Path(folder) / name).write_bytes(content)
        other = load_adapter(base(), folder)
    same = torch.allclose(_logits(net), _logits(other), rtol=1e-5, atol=1e-5)
    require(same, "the outputs differ after the adapter went through its folder")


def _config(net: nn.Module) -> dict[str, Any]:
    return peft_config(net, "a base")


def check_products(make: MakeAdapter, base: MakeModel = model) -> None:
    """Say the same effective weight change as peft, for each layer; where there is none, say nothing."""
    products = make().products
    if products is None:
        return
    net = _move(_attached(make, base()))
    found = products({name: p.detach() for name, p in _trainable(net).items()})
    layers = {name: m for name, m in net.named_modules() if hasattr(m, "get_delta_weight")}
    require(set(found) == set(layers), f"products name {sorted(found)}, and peft has {sorted(layers)}")
    for name, (left, right) in found.items():
        expected = layers[name].get_delta_weight("default").detach()
        near = (left @ right).shape == expected.shape and torch.allclose(left @ right, expected, 1e-4, 1e-6)
        require(near, f"the product of {name} is not the weight change that peft computes")


def check_adapter_seed(make: MakeAdapter, base: MakeModel = model) -> None:
    """Begin with the same bits for the same seed, and do not touch the global generator."""
    results = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            plain = base()
            torch.manual_seed(seed)
            state = bits(torch.get_rng_state())
            results.append(bits(_trainable(_attached(make, plain))))
            require(bits(torch.get_rng_state()) == state, "attaching draws from torch's global generator")
    require(results[0] == results[1], "the same seed gives another first adapter")


def check_first_output(make: MakeAdapter, base: MakeModel = model) -> None:
    """Begin with the base's own outputs. Prompt-like methods may waive it."""
    before = _logits(base())
    near = torch.allclose(_logits(_attached(make, base())), before, rtol=1e-4, atol=1e-5)
    require(near, "the model with a new adapter does not begin with the base's outputs")


ADAPTER = (
    check_frozen,
    check_base,
    check_round_trip,
    check_products,
    check_adapter_seed,
    check_first_output,
)


def check_adapter(make: MakeAdapter, waive: Collection[str] = (), base: MakeModel = model) -> None:
    """Run all checks of an adapter; `base` makes a causal language model, the same each time, that it can be put on."""
    run_all(ADAPTER, waive, make, base)
