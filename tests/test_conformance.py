"""The public checks on every plug-in that Weft has; and for each check, variants that it must catch."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft import plugins
from weft.adapters.lora import lora
from weft.algorithms.fedavg import fedavg
from weft.algorithms.local import local
from weft.core import trees
from weft.core.errors import JobError
from weft.core.sampling import Pool, Sampler, evenly
from weft.core.task import Task
from weft.core.types import Adapter, Algorithm, At, Order, Parcel, Question, Reply, State, Transform, Wire, Work
from weft.data.iid import iid
from weft.data.split import Split
from weft.links.local import Local
from weft.tasks.causal_lm import causal_lm
from weft.tasks.classification import classification
from weft.tasks.image_classification import image_classification
from weft.tasks.image_text import image_text
from weft.testing import (
    adapters,
    algorithms,
    check_adapter,
    check_algorithm,
    check_link,
    check_sampler,
    check_split,
    check_task,
    check_transform,
    links,
    samplers,
    splits,
    tasks,
    transforms,
)
from weft.testing.families import tiny
from weft.testing.sound import bits, run_all
from weft.testing.tiny import model
from weft.transforms.topk import topk
from weft.transforms.weigh import weigh
from weft.transforms.zstd import zstd


@dataclass(frozen=True)
class Example:
    """How a plug-in is made for the checks: its keys, what stands before a transform, what it fails, on which base."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[str | dict[str, Any], ...] = ()
    waive: tuple[str, ...] = ()
    base: Callable[[], nn.Module] = model


def gpt2() -> nn.Module:
    """Return a tiny model that has biases."""
    made = tiny("gpt2", "AutoModelForCausalLM")
    assert isinstance(made, nn.Module)
    return copy.deepcopy(made).requires_grad_(False).eval()


OWN_TENSORS = ("check_frozen", "check_base")  # the adapter is tensors of the base
IN_FRONT = ("check_first_output",)  # virtual tokens change the outputs from the start
SIZES_IGNORED = ("check_weights",)  # robust rules: a size is declared by the client, so each counts once
GROWS = ("check_shapes",)  # what a round adds to the base stays as ranks of their own
IN_A_RING: tuple[str | dict[str, Any], ...] = ("delta", {"clip": {"norm": 1.0}}, {"weigh": {"by": "uniform"}})
EXAMPLES = {
    ("adapter", "bitfit"): Example(waive=OWN_TENSORS, base=gpt2),
    ("adapter", "full"): Example(waive=OWN_TENSORS),
    ("adapter", "prefix"): Example({"tokens": 3}, waive=IN_FRONT),
    ("adapter", "prompt"): Example({"tokens": 3}, waive=IN_FRONT),
    ("adapter", "ptuning"): Example({"tokens": 3, "hidden": 8}, waive=IN_FRONT),
    ("algorithm", "geometric_median"): Example(waive=SIZES_IGNORED),
    ("algorithm", "krum"): Example({"byzantine": 0}, waive=SIZES_IGNORED),
    ("algorithm", "median"): Example(waive=SIZES_IGNORED),
    ("algorithm", "multi_krum"): Example({"byzantine": 0}, waive=SIZES_IGNORED),
    ("algorithm", "norm_bound"): Example({"norm": 1.0}),
    ("algorithm", "trimmed_mean"): Example(waive=SIZES_IGNORED),
    ("algorithm", "fedex_lora"): Example(waive=GROWS),
    ("algorithm", "flora"): Example(waive=(*GROWS, "check_weights")),  # each client begins with a draw of its own
    ("algorithm", "frlora"): Example(waive=GROWS),
    ("algorithm", "hetlora"): Example(waive=("check_weights",)),  # counts by norms and not by examples
    ("algorithm", "local_heads"): Example({"stays": ["n.*"]}),
    ("algorithm", "task_experts"): Example({"tasks": {"one": ["[ab]"], "two": ["[c-e]"]}}),
    ("sampler", "availability"): Example({"windows": {"c[0-4]": [4, 1, 3]}}),
    ("transform", "ring"): Example(before=IN_A_RING),
    ("transform", "mask"): Example(before=(*IN_A_RING, "ring")),
    ("transform", "discrete_noise"): Example({"multiplier": 0.5, "colluders": 1}, before=(*IN_A_RING, "ring")),
    ("transform", "clip"): Example({"norm": 1.0}, before=("delta",)),
    ("transform", "lowrank"): Example({"rank": 1, "feedback": True}, before=("delta",)),
    ("transform", "noise"): Example(
        {"multiplier": 1.0}, before=("delta", {"clip": {"norm": 1.0}}, {"weigh": {"by": "uniform"}})
    ),
    ("transform", "quantize"): Example({"bits": 4, "rounding": "stochastic", "feedback": True}, before=("delta",)),
    ("transform", "random_mask"): Example(before=("delta",)),
    ("transform", "topk"): Example(before=("delta",)),
    ("split", "by"): Example({"column": "source"}),
    ("split", "dirichlet"): Example({"alpha": 1.0, "clients": 3}),
    ("split", "iid"): Example({"clients": 5}),
    ("split", "quantity"): Example({"clients": 3}),
    ("split", "shards"): Example({"clients": 3}),
    ("split", "topic"): Example({"alpha": 1.0, "clients": 3, "topics": 3}),
}
CHECKS: dict[str, Callable[..., None]] = {
    "adapter": check_adapter,
    "algorithm": check_algorithm,
    "sampler": check_sampler,
    "split": check_split,
    "task": check_task,
    "transform": check_transform,
}
PLUGINS = [(kind, name) for kind in CHECKS for name in plugins.names(kind)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many threads on tiny tensors only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(kind: str, value: Any) -> Any:
    return plugins.build(plugins.parse(kind, value), kind)


def example(kind: str, name: str) -> Example:
    fields = plugins.schema(plugins.find(kind, name)).model_fields
    needed = [key for key, known in fields.items() if known.is_required()]
    if needed and (kind, name) not in EXAMPLES:
        pytest.fail(f"the {kind} `{name}` needs {', '.join(needed)}: add it to EXAMPLES in {__file__}")
    return EXAMPLES.get((kind, name), Example())


@pytest.mark.parametrize(("kind", "name"), PLUGINS, ids=[f"{kind}-{name}" for kind, name in PLUGINS])
def test_plugin(kind: str, name: str) -> None:
    how = example(kind, name)
    more: dict[str, Any] = {"waive": how.waive}
    if kind == "transform":
        more["before"] = [lambda step=step: built("transform", step) for step in how.before]
    if kind == "adapter":
        more["base"] = how.base
    CHECKS[kind](lambda: built(kind, {name: how.keys}), **more)


def test_local_link() -> None:
    check_link(Local)


@pytest.mark.parametrize("by", ["examples", "uniform"])
def test_weigh_both_ways(by: Any) -> None:
    check_transform(lambda: weigh(by))


@pytest.mark.parametrize(
    "keys",
    [
        {"rslora": True},
        {"targets": ["q_proj", "down_proj"], "rank": 3},
        {"dropout": 0.3},
        {"dora": True},
        {"init": "pissa", "rank": 4},
        {"init": "pissa", "rank": 4, "rslora": True},
    ],
)
def test_lora_keys(keys: dict[str, Any]) -> None:
    check_adapter(lambda: lora(**keys))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("prefix", {"tokens": 3, "projection": True, "hidden": 8}),
        ("ptuning", {"tokens": 3, "hidden": 8, "encoder": "lstm"}),
        ("prompt", {"tokens": 3, "init": "random"}),
    ],
)
def test_keys_of_virtual_tokens(name: str, keys: dict[str, Any]) -> None:
    check_adapter(lambda: built("adapter", {name: keys}), IN_FRONT)


@pytest.mark.parametrize("style", ["plain", "Q: {question}\n"])
def test_causal_lm_keys(style: str) -> None:
    check_task(lambda: causal_lm(template=style, max_length=56))


def test_the_tables_name_plugins_that_exist() -> None:
    assert set(EXAMPLES) <= set(PLUGINS)


def test_a_plugin_without_an_example_fails_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(EXAMPLES, ("split", "iid"))
    with pytest.raises(pytest.fail.Exception, match="the split `iid` needs clients: add it to EXAMPLES"):
        example("split", "iid")


def test_a_waived_name_that_is_no_check_is_refused() -> None:
    with pytest.raises(AssertionError, match="names no check: check_resmue"):
        check_algorithm(fedavg, waive=["check_resmue"])
    run_all([test_the_tables_name_plugins_that_exist], ["test_the_tables_name_plugins_that_exist"])


# --- broken algorithms


def algorithm_of(
    client: Callable[[Work, State, State], tuple[State, State]] | None = None,
    server: Callable[..., State] | None = None,
    **parts: Any,
) -> Algorithm:
    whole = fedavg()
    return replace(whole, client=client or whole.client, server=server or whole.server, **parts)


def trained(work: Work, received: State) -> State:
    return {"adapter": work.train(received["adapter"])}


def first_client_counts_more() -> Algorithm:
    seen: list[str] = []

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        seen.extend(work.clients)
        update = trained(work, received)
        return {"adapter": trees.add(update["adapter"], update["adapter"], 1.0 / len(seen))}, kept

    return algorithm_of(client)


def block_norm() -> Algorithm:
    """Clip by the norm over all clients of the block together."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        update = work.train(received["adapter"])
        norm = max(1.0, trees.norm(update))
        return {"adapter": {name: value / norm for name, value in update.items()}}, kept

    return algorithm_of(client)


def block_mean() -> Algorithm:
    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        def gradient(grads: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: grad.mean(0, keepdim=True).expand_as(grad) for name, grad in grads.items()}

        return {"adapter": work.train(received["adapter"], gradient)}, kept

    return algorithm_of(client)


def momentum_in_closure() -> Algorithm:
    velocity: dict[str, Tensor] = {}

    def server(state: State, update: State, tally: Any) -> State:
        step = trees.subtract(update["adapter"], state["adapter"])
        for name, value in step.items():
            velocity[name] = 0.5 * velocity.get(name, torch.zeros(())) + value
        return {"adapter": trees.add(state["adapter"], velocity)}

    return algorithm_of(server=server)


def empty_part() -> Algorithm:
    """Begin with a part without tensors, which no file holds, and count on it."""

    def server(state: State, update: State, tally: Any) -> State:
        return {**update, "velocity": {**state["velocity"]}}

    return algorithm_of(server=server, init=lambda first: {"adapter": first, "velocity": {}})


def newest_memory() -> Algorithm:
    """Train each client from what it had last, whichever memory the server says counts."""
    mine: dict[str, dict[str, Tensor]] = {}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        rows = [mine.get(name, trees.pick(kept["adapter"], i)) for i, name in enumerate(work.clients)]
        after = work.train(trees.stack(rows))
        mine.update({name: trees.pick(after, i) for i, name in enumerate(work.clients)})
        return {}, {"adapter": after}

    return replace(local(), client=client)


def counts_its_block() -> Algorithm:
    """Add how many clients are trained beside a client, which depends on the site."""

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        update = trained(work, received)
        return {"adapter": {name: value + len(work.clients) for name, value in update["adapter"].items()}}, kept

    return algorithm_of(client)


def client_in_place() -> Algorithm:
    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        update = trained(work, received)
        received["adapter"]["n.bias"].zero_()
        return update, kept

    return algorithm_of(client)


def server_in_place() -> Algorithm:
    def server(state: State, update: State, tally: Any) -> State:
        for name, value in update["adapter"].items():
            state["adapter"][name].copy_(value)
        return state

    return algorithm_of(server=server)


def half_update() -> Algorithm:
    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        whole = trained(work, received)["adapter"]
        return {"delta": {name: value.half() for name, value in whole.items()}}, kept

    return algorithm_of(client, lambda state, update, tally: {"adapter": update["delta"]})


def double_state() -> Algorithm:
    def server(state: State, update: State, tally: Any) -> State:
        return {**update, "velocity": {name: v.double() for name, v in update["adapter"].items()}}

    return algorithm_of(server=server, init=lambda first: {"adapter": first, "velocity": first})


def half_memory() -> Algorithm:
    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        update = trained(work, received)
        return update, {"last": {name: value.half() for name, value in update["adapter"].items()}}

    return algorithm_of(client, keep=lambda first: {"last": {name: v.half() for name, v in first.items()}})


def growing_state() -> Algorithm:
    def server(state: State, update: State, tally: Any) -> State:
        return {**update, "history": {str(tally.round): torch.zeros(2)}}

    return algorithm_of(server=server)


def reads_what_is_not_sent() -> Algorithm:
    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        return {"adapter": trees.add(work.train(received["adapter"]), received["velocity"])}, kept

    return algorithm_of(
        client,
        lambda state, update, tally: {**state, **update},
        init=lambda first: {"adapter": first, "velocity": {name: v.clone() for name, v in first.items()}},
    )


def wrong_way() -> Algorithm:
    def server(state: State, update: State, tally: Any) -> State:
        step = trees.subtract(update["adapter"], state["adapter"])
        return {"adapter": trees.add(state["adapter"], step, -0.05)}

    return algorithm_of(server=server)


def twice_the_step() -> Algorithm:
    """Go twice as far as the mean, and say nothing of it."""

    def server(state: State, update: State, tally: Any) -> State:
        step = trees.subtract(update["adapter"], state["adapter"])
        return {"adapter": trees.add(state["adapter"], step, 2.0)}

    return algorithm_of(server=server)


def by_head_count() -> Algorithm:
    """Step by the number of clients and not by what they count for."""

    def server(state: State, update: State, tally: Any) -> State:
        step = trees.subtract(update["adapter"], state["adapter"])
        return {"adapter": trees.add(state["adapter"], step, 1.0 / len(tally.weights))}

    return algorithm_of(server=server)


# --- broken transforms


def transform_of(client: Any = None, **parts: Any) -> Callable[[], Transform]:
    def make() -> Transform:
        return Transform(client=client, **parts) if client else Transform(**parts)

    return make


def scaled(parcel: Parcel, factor: float) -> Parcel:
    update = {part: {n: v * factor for n, v in tree.items()} for part, tree in parcel.update.items()}
    return replace(parcel, update=update)


def check_that_counts() -> Transform:
    asked: list[int] = []

    def check(wire: Wire) -> Wire:
        asked.append(1)
        if len(asked) > 1:
            raise JobError("only once")
        return wire

    return Transform(check=check)


def check_that_alternates() -> Transform:
    asked: list[int] = []

    def check(wire: Wire) -> Wire:
        asked.append(1)
        return replace(wire, weighted=len(asked) % 2 == 0)

    return Transform(check=check)


def in_place(at: At, parcel: Parcel) -> Parcel:
    for tree in parcel.update.values():
        for value in tree.values():
            value.mul_(0.5)
    return parcel


def server_halves_in_place() -> Transform:
    whole = weigh()

    def server(total: Any, tally: Any) -> Any:
        result = whole.server(total, tally)
        total.limbs["adapter"]["w"].zero_()
        return result

    return replace(whole, server=server)


def noisy(at: At, parcel: Parcel) -> Parcel:
    return scaled(parcel, float(torch.rand(())))


def counting_client() -> Transform:
    seen: list[str] = []

    def client(at: At, parcel: Parcel) -> Parcel:
        seen.append(at.client)
        return scaled(parcel, 1.0 / len(seen))

    return Transform(client=client)


def running_float_sum() -> Transform:
    """Sum the updates as floats in the order in which they come."""
    sums: dict[str, Tensor] = {}

    def client(at: At, parcel: Parcel) -> Parcel:
        for name, value in parcel.update["adapter"].items():
            sums[name] = sums.get(name, torch.zeros(())) + value * parcel.examples
        return parcel

    def server(total: Any, tally: Any) -> State:
        result = {"adapter": {name: value / 8 for name, value in sums.items()}}
        sums.clear()
        return result

    return Transform(check=lambda wire: replace(wire, weighted=True), client=client, server=server)


def half_way(at: At, parcel: Parcel) -> Parcel:
    update = {part: {n: v.half() for n, v in tree.items()} for part, tree in parcel.update.items()}
    return replace(parcel, update=update)


def shrunken_mean() -> Transform:
    whole = weigh()
    return replace(whole, client=lambda at, parcel: scaled(whole.client(at, parcel), 1 - 1e-6))


def coder(client: Callable[[State], State], arrive: Callable[[At, State], State], **parts: Any) -> Any:
    """Return an encoding from two functions."""

    def step(at: At, parcel: Parcel) -> Parcel:
        return replace(parcel, update=client(parcel.update))

    return transform_of(step, check=lambda wire: replace(wire, encoded="coder"), arrive=arrive, **parts)


def without_zeros(update: State) -> State:
    """Send the numbers that are above zero, however many there are."""
    vector = trees.joined(update)
    return {"coder": {"values": vector[vector > 0]}}


def zeros_like_form(at: At, update: State) -> State:
    return {part: {name: torch.zeros_like(value) for name, value in tree.items()} for part, tree in at.form.items()}


def as_a_vector(update: State) -> State:
    return {"coder": {"values": trees.joined(update)}}


def one_vector_back(at: At, update: State) -> State:
    return {"adapter": {"all": update["coder"]["values"]}}


def careless_topk() -> Transform:
    """Decode places without looking at them."""
    whole = topk(feedback=False)

    def arrive(at: At, update: State) -> State:
        result = torch.zeros(len(trees.joined(at.form)))
        result[update["topk"]["places"].long()] = update["topk"]["values"]
        return trees.parted(result, at.form)

    return replace(whole, check=lambda wire: replace(wire, encoded="topk"), arrive=arrive)


def careless_zstd() -> Transform:
    """Unpack whatever comes."""
    import zstandard

    def arrive(at: At, update: State) -> State:
        content = zstandard.ZstdDecompressor().decompress(update["zstd"]["zstd"].numpy().tobytes())
        return trees.parted(torch.frombuffer(bytearray(content), dtype=torch.float32), at.form)

    return replace(zstd(), arrive=arrive)


def residual_in_closure() -> Transform:
    left: dict[str, Tensor] = {}

    def client(at: At, parcel: Parcel) -> Parcel:
        halves = scaled(parcel, 0.5).update["adapter"]
        sent = {name: value + left.get(at.client + name, 0) for name, value in halves.items()}
        left.update({at.client + name: value for name, value in halves.items()})
        return replace(parcel, update={"adapter": sent})

    return Transform(client=client, remembers=True)


def residual_unsaid() -> Transform:
    return Transform(client=lambda at, parcel: replace(parcel, kept=parcel.update))


# --- broken adapters


def attached(change: Callable[[nn.Module, int], object], **keys: Any) -> Callable[[], Adapter]:
    """Return a LoRA that changes its model after attaching."""

    def make() -> Adapter:
        whole = lora(**keys)

        def attach(base: nn.Module, peft_type: str, seed: int) -> nn.Module:
            net = whole.attach(base, peft_type, seed)
            change(net, seed)
            return net

        return replace(whole, attach=attach)

    return make


def loosen(net: nn.Module, seed: int) -> None:
    next(p for name, p in net.named_parameters() if "norm" in name).requires_grad_(True)


def freeze(net: nn.Module, seed: int) -> None:
    net.requires_grad_(False)


def drifting_base(net: nn.Module, seed: int) -> None:
    """Let a tensor of the base follow each backward pass, though it is no parameter to train."""
    weight = next(p for name, p in net.named_parameters() if "norm" in name)

    def drift(grad: Tensor) -> None:
        weight.data.mul_(1.01)

    next(p for p in net.parameters() if p.requires_grad).register_hook(drift)


def outside_peft(net: nn.Module, seed: int) -> None:
    net.register_parameter("gate", nn.Parameter(torch.ones(())))
    net.register_forward_hook(lambda module, args, out: replace_logits(out, out.logits * net.gate))


def replace_logits(out: Any, logits: Tensor) -> Any:
    out.logits = logits
    return out


def seed_in_the_base(net: nn.Module, seed: int) -> None:
    """Change the function by the seed in a place that peft's format does not hold."""
    net.register_forward_hook(lambda module, args, out: replace_logits(out, out.logits + seed))


def redraw(net: nn.Module, seed: int) -> None:
    for name, value in net.named_parameters():
        if ".lora_A." in name:
            value.data.normal_()


def redraw_aside(net: nn.Module, seed: int) -> None:
    with torch.random.fork_rng():
        redraw(net, seed)


def not_zero(net: nn.Module, seed: int) -> None:
    for name, value in net.named_parameters():
        if ".lora_B." in name:
            value.data.fill_(0.1)


def products_without_scale() -> Adapter:
    whole = lora(rank=4, alpha=16)

    def products(tensors: dict[str, Tensor]) -> Any:
        assert whole.products
        return {name: (left / 4, right) for name, (left, right) in whole.products(tensors).items()}

    return replace(whole, products=products)


def products_of_some() -> Adapter:
    whole = lora()

    def products(tensors: dict[str, Tensor]) -> Any:
        assert whole.products
        return dict(list(whole.products(tensors).items())[1:])

    return replace(whole, products=products)


# --- broken tasks


def task_of(make: Callable[[], Task], **parts: Callable[[Task], Any]) -> Callable[[], Task]:
    """Return a task with parts made from those of a sound one."""
    return lambda: replace(make(), **{name: change(make()) for name, change in parts.items()})


def counts_padding(task: Task) -> Any:
    def collate(rows: Any, pad: int) -> Any:
        batch = task.collate(rows, pad)
        flat = batch["input_ids"].flatten()
        index = torch.arange(len(flat) - 1)
        per_client = len(flat) // len(rows)
        counts = [per_client] * (len(rows) - 1) + [per_client - 1]
        return {**batch, "index": index, "targets": flat[1:], "counts": counts}

    return collate


def ignores_mask(task: Task) -> Any:
    """Pad on the left without a mask: the padding is read, though it is not counted."""

    def loss(net: nn.Module, batch: Any) -> Any:
        rows, length = batch["input_ids"].shape
        ids = torch.cat([torch.full((rows, 40 - length % 7), 5), batch["input_ids"]], 1)
        logits = net(input_ids=ids).logits.float()
        losses = nn.functional.cross_entropy(logits, batch["labels"].clamp(min=0), reduction="none")
        return losses.view(len(batch["counts"]), -1).sum(1), torch.tensor(batch["counts"])

    return loss


def mean_loss(task: Task) -> Any:
    def loss(net: nn.Module, batch: Any) -> Any:
        total, count = task.loss(net, batch)
        return total / count.clamp(min=1), count

    return loss


def one_loss_for_all(task: Task) -> Any:
    def loss(net: nn.Module, batch: Any) -> Any:
        total, count = task.loss(net, batch)
        return total.mean().expand_as(total), count

    return loss


def negatives_of_all(task: Task) -> Any:
    """Let a picture be told from other clients' captions as well."""

    def loss(net: nn.Module, batch: Any) -> Any:
        total, _ = task.loss(net, {**batch, "counts": [len(batch["input_ids"])]})
        return total.expand(len(batch["counts"])) / len(batch["counts"]), torch.tensor(batch["counts"])

    return loss


def scalar_loss(task: Task) -> Any:
    def loss(net: nn.Module, batch: Any) -> Any:
        total, count = task.loss(net, batch)
        return total.sum(), count.sum()

    return loss


def encode_with(change: Callable[[list[Any]], Any], before: Callable[[Any], Any] = lambda r: r) -> Any:
    def part(task: Task) -> Any:
        def encode(words: Any, records: Any, classes: Any) -> Any:
            encoded = task.encode(words, before(records), classes)
            return replace(encoded, examples=change(list(encoded.examples)))

        return encode

    return part


def pop_answer(records: Any) -> Any:
    rows = [dict(record) for record in records]
    for record in records:
        record.pop("source", None)
    return rows


def encode_anew(task: Task) -> Any:
    asked: list[int] = []

    def encode(words: Any, records: Any, classes: Any) -> Any:
        asked.append(1)
        encoded = task.encode(words, records, classes)
        return replace(encoded, truncated=len(asked))

    return encode


def shorten_in_place(task: Task) -> Any:
    def shorten(example: Any, longest: int) -> Any:
        short = task.shorten(example, longest)
        example.update(short)
        return example

    return shorten


def shorten_to_nothing(task: Task) -> Any:
    def shorten(example: Any, longest: int) -> Any:
        return {**example, "ids": example["ids"][:longest], "labels": example["labels"][:longest]}

    return shorten


def pack_as_one(task: Task) -> Any:
    """Pack the examples so that each reads those before it."""

    def pack(rows: Any) -> Any:
        assert task.pack
        batch = task.pack(rows)
        return {**batch, "lengths": [sum(batch["lengths"])]}

    return pack


def pack_with_a_label_less(task: Task) -> Any:
    def pack(rows: Any) -> Any:
        assert task.pack
        batch = task.pack(rows)
        return {**batch, "index": batch["index"][1:], "targets": batch["targets"][1:]}

    return pack


def measured_means(task: Task) -> Any:
    def measure(probe: Any, examples: Any, metrics: Any) -> Any:
        sums = task.measure(probe, examples, metrics)
        return {name: value / len(examples) for name, value in sums.items()}

    return measure


def measured_rounded(task: Task) -> Any:
    """Skip the last batch that is not full."""

    def measure(probe: Any, examples: Any, metrics: Any) -> Any:
        return task.measure(probe, examples[: len(examples) // 5 * 5], metrics)

    return measure


def each_reversed(task: Task) -> Any:
    assert task.each
    return lambda probe, examples, metrics: task.each(probe, examples, metrics)[::-1]  # type: ignore[misc]


def each_less(task: Task) -> Any:
    """Forget one example's loss, and keep its row."""

    def each(probe: Any, examples: Any, metrics: Any) -> Any:
        assert task.each
        rows = task.each(probe, examples, metrics)
        return [*rows[:-1], {**rows[-1], "loss": 0.0}]

    return each


def each_once(task: Task) -> Any:
    return lambda probe, examples, metrics: [task.measure(probe, examples, metrics)]


def summed(task: Task) -> Any:
    return lambda sums: {**task.summarize(sums), "total": sums["count"]}


def not_a_number(task: Task) -> Any:
    return lambda sums: {"loss": float("nan")}


def summary_in_place(task: Task) -> Any:
    def summarize(sums: Any) -> Any:
        result = task.summarize(sums)
        sums["count"] = 1.0
        return result

    return summarize


# --- broken splits


def split_of(change: Callable[[dict[str, list[int]], Any], dict[str, list[int]]]) -> Callable[[], Split]:
    return lambda: Split(lambda records, seed: change(iid(4).assign(records, seed), records))


def loses_a_record(found: dict[str, list[int]], records: Any) -> dict[str, list[int]]:
    return {**found, "client-0": found["client-0"][1:]}


def gives_twice(found: dict[str, list[int]], records: Any) -> dict[str, list[int]]:
    return {**found, "client-0": sorted([*found["client-0"], found["client-1"][0]])}


def leaves_one_empty(found: dict[str, list[int]], records: Any) -> dict[str, list[int]]:
    return {**found, "client-9": []}


def backwards(found: dict[str, list[int]], records: Any) -> dict[str, list[int]]:
    return {name: places[::-1] for name, places in found.items()}


def by_chance(found: dict[str, list[int]], records: Any) -> dict[str, list[int]]:
    order = torch.randperm(len(records)).tolist()
    return {"client-0": sorted(order[:9]), "client-1": sorted(order[9:])}


def marks_records(found: dict[str, list[int]], records: Any) -> dict[str, list[int]]:
    for record in records:
        record["seen"] = True
    return found


# --- broken samplers


def sampler_of(draw: Callable[[Pool], Any] = evenly, learn: Any = None, **parts: Any) -> Callable[[], Sampler]:
    return lambda: Sampler(draw, learn or (lambda pool, replies: {}), even=True, **parts)


def draws_by_chance(pool: Pool) -> list[str]:
    return [pool.names[i] for i in torch.randperm(len(pool.names)).tolist()][: pool.count]


def learns_in_place(pool: Pool, replies: Any) -> dict[str, Tensor]:
    if pool.memory:
        pool.memory["last"] += 1
    return pool.memory or {"last": torch.zeros(1)}


# --- broken links


@dataclass(frozen=True)
class Broken:
    """A local link that changes replies, orders or answers on the way."""

    sites: Any
    reply: Callable[[Reply], Reply] = lambda reply: reply
    order: Callable[[Order], Order] = lambda order: order
    every: int = 1
    answers: Callable[[list[Any]], list[Any]] = lambda answers: answers

    def exchange(self, order: Order) -> Iterator[Reply]:
        for place, reply in enumerate(Local(self.sites).exchange(self.order(order))):
            if (place + 1) % self.every == 0:
                yield self.reply(reply)

    def ask(self, question: Question) -> list[Any]:
        return self.answers(Local(self.sites).ask(question))


def link_of(**parts: Any) -> Callable[[Any], Broken]:
    return lambda sites: Broken(sites, **parts)


def through_half(reply: Reply) -> Reply:
    update = {part: {n: v.half().float() for n, v in tree.items()} for part, tree in reply.update.items()}
    return replace(reply, update=update)


def drop_measured(reply: Reply) -> Reply:
    return replace(reply, measured={})


def half_order(order: Order) -> Order:
    state = {part: {n: v.half().float() for n, v in tree.items()} for part, tree in order.state.items()}
    return replace(order, state=state)


def zeroed_order(order: Order) -> Order:
    for value in order.state["adapter"].values():
        value.zero_()
    return order


def first_site_favoured(sites: Any) -> Broken:
    first = set(sites[0].toy.clients)

    def change(reply: Reply) -> Reply:
        return replace(reply, weight=reply.weight + 1) if reply.client in first else reply

    return Broken(sites, reply=change)


CONTROLS: dict[Callable[..., None], list[Any]] = {
    algorithms.check_reply_order: [first_client_counts_more],
    algorithms.check_block_size: [block_norm, block_mean],
    algorithms.check_resume: [momentum_in_closure, empty_part],
    algorithms.check_lost_replies: [newest_memory, momentum_in_closure],
    algorithms.check_inputs: [client_in_place, server_in_place],
    algorithms.check_state: [half_update, double_state, half_memory],
    algorithms.check_shapes: [growing_state],
    algorithms.check_sends: [reads_what_is_not_sent, lambda: algorithm_of(sends=("adapter", "velocity"))],
    algorithms.check_link_parity: [counts_its_block],
    algorithms.check_dropped: [newest_memory, lambda: algorithm_of(server=lambda state, update, tally: state)],
    algorithms.check_retried: [newest_memory],
    algorithms.check_stale: [
        lambda: algorithm_of(lambda work, received, kept: ({"change": trained(work, received)["adapter"]}, kept)),
        lambda: algorithm_of(lambda work, received, kept: ({**trained(work, received), "steps": {}}, kept)),
    ],
    algorithms.check_reach: [twice_the_step],
    algorithms.check_learning: [
        wrong_way,
        lambda: algorithm_of(server=lambda state, update, tally: state),
        lambda: replace(local(), client=lambda work, received, kept: ({}, kept)),
    ],
    algorithms.check_weights: [by_head_count],
    transforms.check_wire: [
        check_that_counts,
        check_that_alternates,
        transform_of(check=lambda wire: None),
    ],
    transforms.check_transform_inputs: [transform_of(in_place), server_halves_in_place],
    transforms.check_draws: [transform_of(noisy), counting_client],
    transforms.check_parcel: [
        transform_of(half_way),
        lambda: replace(weigh(), client=lambda at, parcel: replace(parcel, weight=0)),
    ],
    transforms.check_transform_order: [counting_client, running_float_sum],
    transforms.check_form: [coder(without_zeros, zeros_like_form), coder(as_a_vector, one_vector_back)],
    transforms.check_damage: [careless_topk, careless_zstd],
    transforms.check_memory: [residual_in_closure, residual_unsaid],
    transforms.check_one_client: [shrunken_mean],
    adapters.check_frozen: [attached(loosen), attached(freeze)],
    adapters.check_base: [attached(loosen), attached(drifting_base)],
    adapters.check_round_trip: [attached(outside_peft), attached(seed_in_the_base)],
    adapters.check_products: [products_without_scale, products_of_some],
    adapters.check_adapter_seed: [attached(redraw), attached(redraw_aside)],
    adapters.check_first_output: [attached(not_zero)],
    tasks.check_encoding: [
        task_of(classification, encode=encode_with(lambda rows: rows[1:])),
        task_of(classification, encode=encode_with(lambda rows: rows, pop_answer)),
        lambda: task_of(classification, encode=lambda task: COUNTED)(),
    ],
    tasks.check_padding: [
        task_of(causal_lm, collate=counts_padding),
        task_of(causal_lm, loss=mean_loss),
        task_of(classification, loss=ignores_mask),
    ],
    tasks.check_clients: [
        task_of(causal_lm, loss=mean_loss),
        task_of(causal_lm, loss=one_loss_for_all),
        task_of(classification, loss=scalar_loss),
        task_of(image_classification, loss=one_loss_for_all),
        task_of(image_text, loss=negatives_of_all),
    ],
    tasks.check_shortening: [
        task_of(causal_lm, shorten=shorten_in_place),
        task_of(causal_lm, shorten=shorten_to_nothing),
        task_of(causal_lm, shorten=lambda task: lambda example, longest: example),
    ],
    tasks.check_packing: [
        task_of(causal_lm, pack=pack_as_one),
        task_of(causal_lm, pack=pack_with_a_label_less),
    ],
    tasks.check_measuring: [
        task_of(classification, measure=measured_means),
        task_of(classification, measure=measured_rounded),
    ],
    tasks.check_each: [
        task_of(classification, each=each_reversed),
        task_of(classification, each=each_less),
        task_of(classification, each=each_once),
    ],
    tasks.check_summary: [
        task_of(classification, summarize=summed),
        task_of(classification, summarize=not_a_number),
        task_of(classification, summarize=summary_in_place),
    ],
    splits.check_partition: [split_of(loses_a_record), split_of(gives_twice)],
    splits.check_nobody_empty: [split_of(leaves_one_empty), split_of(backwards)],
    splits.check_seed: [split_of(by_chance), split_of(marks_records)],
    samplers.check_cohorts: [
        sampler_of(lambda pool: [pool.names[0]] * pool.count),
        sampler_of(lambda pool: [*evenly(pool)[1:], "nobody"]),
        sampler_of(lambda pool: evenly(pool)[1:]),
    ],
    samplers.check_sampler_draws: [sampler_of(draws_by_chance)],
    samplers.check_sampler_memory: [
        sampler_of(learn=learns_in_place),
        sampler_of(learn=lambda pool, replies: {"last": torch.zeros(1, dtype=torch.float64)}),
    ],
    samplers.check_even: [sampler_of(lambda pool: pool.names[: pool.count])],
    links.check_replies: [
        link_of(reply=through_half),
        link_of(reply=drop_measured),
        link_of(order=half_order),
        link_of(every=2),
    ],
    links.check_bytes: [
        link_of(reply=lambda reply: replace(reply, bytes_up=reply.bytes_up - 1)),
        link_of(reply=lambda reply: replace(reply, bytes_down=0)),
    ],
    links.check_link_order: [first_site_favoured, link_of(order=zeroed_order)],
    links.check_questions: [
        link_of(answers=lambda answers: answers[:1]),
        link_of(answers=lambda answers: answers[::-1]),
    ],
}
COUNTED = encode_anew(classification())
SUITES = (
    *algorithms.ALGORITHM,
    *transforms.TRANSFORM,
    *adapters.ADAPTER,
    *tasks.TASK,
    *splits.SPLIT,
    *samplers.SAMPLER,
    *links.LINK,
)


def test_every_check_has_a_negative_control() -> None:
    assert set(CONTROLS) == set(SUITES)


@pytest.mark.parametrize(
    ("check", "make"),
    [
        pytest.param(check, make, id=f"{check.__name__}-{place}")
        for check, row in CONTROLS.items()
        for place, make in enumerate(row)
    ],
)
def test_a_broken_variant_is_caught(check: Callable[..., None], make: Any) -> None:
    with pytest.raises(AssertionError) as caught:
        check(make)
    assert len(str(caught.value).splitlines()[0]) > 20


def test_bits_tell_zeros_and_types_apart() -> None:
    assert bits(torch.tensor(0.0)) != bits(torch.tensor(-0.0))
    assert bits(torch.zeros(2)) != bits(torch.zeros(2, dtype=torch.int32))
    assert bits({"a": [torch.ones(1)]}) == bits({"a": (torch.ones(1),)})
