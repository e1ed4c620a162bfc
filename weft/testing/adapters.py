"""What every adapter must pass, on a tiny Llama."""

import warnings
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from weft.core.types import Adapter, Tensors
from weft.testing.sound import bits, require, run_all, running
from weft.testing.tiny import model

MakeAdapter = Callable[[], Adapter]
IDS = torch.tensor([[1, 40, 41, 42, 43, 2], [1, 50, 40, 61, 7, 8]])


def _attached(make: MakeAdapter, seed: int = 7, base: nn.Module | None = None) -> nn.Module:
    with running("the adapter cannot be attached to a Llama"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a name that is being renamed
        return make().attach(base or model(), "CAUSAL_LM", seed).eval()


def _logits(net: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = net(input_ids=IDS).logits
    return result


def _trainable(net: nn.Module) -> Tensors:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def _moved(make: MakeAdapter, seed: int = 7) -> nn.Module:
    """Return an attached model away from its start, where B = 0 would hide a mistake."""
    net = _attached(make, seed)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in _trainable(net).values():
            value += 0.1 * torch.randn(value.shape, generator=draw)
    return net


def check_frozen(make: MakeAdapter) -> None:
    """Train something, but no tensor of the base."""
    base = model()
    own = {id(p): name for name, p in base.named_parameters()}
    trained = _trainable(_attached(make, base=base))
    require(bool(trained), "the adapter leaves nothing to train")
    loose = [own[id(p)] for p in trained.values() if id(p) in own]
    require(not loose, f"the base's tensor {', '.join(loose)} is left trainable")


def check_base(make: MakeAdapter) -> None:
    """Leave the base bit for bit as it was after a training step that changes the adapter."""
    base = model()
    own = dict(base.named_parameters())
    before = bits(own)
    net = _attached(make, base=base)
    first = bits(_trainable(net))
    with running("the adapter cannot be trained"):
        net(input_ids=IDS, labels=IDS).loss.backward()
        torch.optim.SGD(_trainable(net).values(), lr=0.1).step()
    require(bits(_trainable(net)) != first, "a training step changes nothing")
    changed = [name for name, p in own.items() if bits(p) != before[name]]
    require(not changed, f"a training step changes the base's tensor {', '.join(changed)}")


def check_round_trip(make: MakeAdapter) -> None:
    """Give the same outputs after peft's own file format, every trainable tensor in it."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    net, other = _moved(make), _attached(make, seed=8)
    with running("peft cannot write and read the adapter"):
        saved = get_peft_model_state_dict(net, save_embedding_layers=False)
        held = {tensor.data_ptr() for tensor in saved.values()}
        set_peft_model_state_dict(other, saved)
    lost = [name for name, p in _trainable(net).items() if p.data_ptr() not in held]
    require(not lost, f"peft's file format does not hold {', '.join(lost)}")
    same = torch.equal(_logits(net), _logits(other))
    require(same, "the outputs differ after the adapter went through peft's format")


def check_products(make: MakeAdapter) -> None:
    """Say the same effective weight change as peft, for each layer; where there is none, say nothing."""
    products = make().products
    if products is None:
        return
    net = _moved(make)
    found = products({name: p.detach() for name, p in _trainable(net).items()})
    layers = {name: m for name, m in net.named_modules() if hasattr(m, "get_delta_weight")}
    require(set(found) == set(layers), f"products name {sorted(found)}, and peft has {sorted(layers)}")
    for name, (left, right) in found.items():
        expected = layers[name].get_delta_weight("default").detach()
        near = (left @ right).shape == expected.shape and torch.allclose(left @ right, expected, 1e-4, 1e-6)
        require(near, f"the product of {name} is not the weight change that peft computes")


def check_adapter_seed(make: MakeAdapter) -> None:
    """Begin with the same bits for the same seed, and do not touch the global generator."""
    results = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            base = model()
            torch.manual_seed(seed)
            state = bits(torch.get_rng_state())
            results.append(bits(_trainable(_attached(make, base=base))))
            require(bits(torch.get_rng_state()) == state, "attaching draws from torch's global generator")
    require(results[0] == results[1], "the same seed gives another first adapter")


def check_first_output(make: MakeAdapter) -> None:
    """Begin with the base's own outputs. Prompt-like methods may waive it."""
    base = model()
    before = _logits(base)
    near = torch.allclose(_logits(_attached(make, base=base)), before, rtol=1e-4, atol=1e-5)
    require(near, "the model with a new adapter does not begin with the base's outputs")


ADAPTER = (
    check_frozen,
    check_base,
    check_round_trip,
    check_products,
    check_adapter_seed,
    check_first_output,
)


def check_adapter(make: MakeAdapter, waive: Collection[str] = ()) -> None:
    """Run all checks of an adapter."""
    run_all(ADAPTER, waive, make)
