"""The training loop against plain peft loops, block against one by one, and the controls that must differ."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from weft import Job
from weft.core import trees
from weft.core.task import Example
from weft.core.types import Tensors
from weft.prepare import Bench, prepare, set_up
from weft.site.cohort import Cohort, Mode
from weft.site.optimizers import Optimizer
from weft.site.recipe import Recipe, batches


def engine(bench: Bench, mode: Mode, **changes: Any) -> Cohort:
    recipe = replace(bench.prepared.plan.recipe, **changes)
    return Cohort(bench.loaded, bench.prepared.task, recipe, 3, mode, bench.loaded.lift)


def double(bench: Bench) -> Bench:
    """Turn the model into float64, where only a real difference is larger than 1e-9."""
    bench.loaded.net.double()
    bench.loaded.initial = {name: at[0][0]._parameters[at[0][1]] for name, at in bench.loaded.places.items()}
    return bench


def trained(cohort: Cohort, data: dict[str, Sequence[Example]], block: int, round_: int = 1) -> dict[str, Tensors]:
    """Train the clients in blocks, each from an adapter of its own that is not the start's zeros."""
    result, names = {}, list(data)
    for at in range(0, len(names), block):
        part = names[at : at + block]
        start = trees.stack(
            {n: p.detach() + 0.01 * (1 + names.index(client)) for n, p in cohort.loaded.initial.items()}
            for client in part
        )
        out = cohort.train(round_, {name: data[name] for name in part}, start, {}, None)
        result.update({name: trees.pick(out.params, k) for k, name in enumerate(part)})
    return result


def apart(left: dict[str, Tensors], right: dict[str, Tensors]) -> float:
    return max(float((left[c][n] - right[c][n]).abs().max()) for c in left for n in left[c])


def data_of(bench: Bench) -> dict[str, Sequence[Example]]:
    return {name: rows.examples for name, rows in bench.train.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_client_equals_a_plain_peft_loop(job: Job, optimizer: str) -> None:
    """An independent loop: peft's model, torch.optim, cross entropy on shifted labels, clip_grad_norm_, in float64."""
    bench = double(set_up(prepare(job)))
    client, rows = "site-0", bench.train["site-0"].examples
    changes = {"optimizer": optimizer, "clip": 0.05, "weight_decay": 0.1, "epochs": 2}
    cohort = engine(bench, "single", **changes)
    start = {n: p.detach() + 0.01 for n, p in bench.loaded.initial.items()}
    ours = cohort.train(1, {client: rows}, trees.expand(start, 1), {}, None)

    net, recipe = bench.loaded.net, cohort.recipe
    params = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            params[name].copy_(value)
    mine = [params[name] for name in start]
    make = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    plain = make(mine, lr=recipe.lr, weight_decay=0.1)
    losses = []
    for chosen in batches(len(rows), recipe, 3, 1, client):
        longest = max(len(rows[i]["ids"]) for i in chosen)
        ids, labels = torch.zeros(len(chosen), longest, dtype=torch.long), torch.full((len(chosen), longest), -100)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            n = len(rows[i]["ids"])
            ids[row, :n], labels[row, :n], mask[row, :n] = rows[i]["ids"], rows[i]["labels"], 1
        logits = net(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mine, 0.05)
        plain.step()
        losses.append(float(loss.detach()))
    worst = max(float((params[n].detach() - ours.params[n][0]).abs().max()) for n in start)
    moved = max(float((params[n].detach() - start[n]).abs().max()) for n in start)
    assert worst < 1e-6 < 5e-4 < moved  # the model itself rounds its norms to float32
    assert ours.losses[0].tolist() == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("mode", ["padded", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_block_equals_its_clients_one_by_one(values: dict[str, Any], mode: Mode, dropout: float) -> None:
    """Ragged lengths, unequal numbers of steps (5, 5 and 4 records by 2), clipping that always bites, dropout."""
    values["adapter"]["lora"]["dropout"] = dropout
    bench = double(set_up(prepare(Job(**values))))
    data = data_of(bench)
    assert len({len(rows) for rows in data.values()}) == 2
    cohort = engine(bench, mode, clip=0.05, epochs=2)
    alone, together, pairs = (trained(cohort, data, block) for block in (1, 3, 2))
    assert apart(alone, together) < 1e-7
    assert apart(alone, pairs) < 1e-7


def test_packed_equals_padded(job: Job) -> None:
    bench = double(set_up(prepare(job)))
    data = data_of(bench)
    padded, packed = (trained(engine(bench, mode), data, 3) for mode in ("padded", "packed"))
    assert apart(padded, packed) < 1e-7


def test_a_global_clip_would_differ(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one norm over the block instead of one a client moves the clients apart."""
    bench = double(set_up(prepare(job)))
    cohort, data = engine(bench, "padded", clip=0.05), data_of(bench)
    right = trained(cohort, data, 3)
    norm = torch.Tensor.norm

    def global_norm(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dim") == 1 and kwargs.get("keepdim"):
            return norm(tensor).expand(len(tensor), 1)
        return norm(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "norm", global_norm)
    assert apart(right, trained(cohort, data, 3)) > 1e-4


def test_a_client_without_company_draws_the_same_dropout(values: dict[str, Any]) -> None:
    """And another client, round or step draws another one."""
    values["adapter"]["lora"]["dropout"] = 0.5
    bench = double(set_up(prepare(Job(**values))))
    cohort, data = engine(bench, "packed"), data_of(bench)
    one = trained(cohort, data, 1)
    assert apart(one, trained(cohort, data, 1)) == 0
    assert apart(one, trained(cohort, data, 1, round_=2)) > 1e-4


def test_accumulation_equals_one_large_batch(job: Job) -> None:
    """Token means are taken over the whole step: 2 x 2 examples give the gradient of 4, whatever their lengths."""
    bench = double(set_up(prepare(job)))
    data = data_of(bench)
    whole = trained(engine(bench, "packed", batch=4, accumulate=1), data, 3)
    parts = trained(engine(bench, "packed", batch=2, accumulate=2), data, 3)
    assert apart(whole, parts) < 1e-9


def test_checkpointing_changes_nothing_but_memory(values: dict[str, Any]) -> None:
    values["adapter"]["lora"]["dropout"] = 0.2
    plain = double(set_up(prepare(Job(**values))))
    values["local"]["checkpointing"] = True
    saving = double(set_up(prepare(Job(**values))))
    assert saving.loaded.net.get_base_model().is_activation_checkpointing
    for mode in ("packed", "padded"):
        left = trained(engine(plain, mode), data_of(plain), 3)
        assert apart(left, trained(engine(saving, mode), data_of(saving), 3)) < 1e-9


def test_out_of_memory_halves_the_block_and_loses_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = double(set_up(prepare(job)))
    data, said = data_of(bench), []
    cohort = engine(bench, "packed")
    expected = trained(cohort, data, 3)
    real, calls = Cohort.losses, []

    def failing(self: Cohort, params: Tensors, rows: Any, *rest: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:  # in the third step, with moments behind it
            raise torch.OutOfMemoryError("planted")
        return real(self, params, rows, *rest)

    monkeypatch.setattr(Cohort, "losses", failing)
    assert apart(expected, trained(replace(cohort, notice=said.append), data, 3)) < 1e-9
    assert said == ["out of memory with 2 clients in a block; going on with 1"] or "going on with 1" in said[0]


def test_nan_stays_with_its_client(job: Job) -> None:
    """One client's adapter is NaN: the others' results are the same bits as with a healthy neighbour's."""
    bench = set_up(prepare(job))
    data = data_of(bench)
    cohort = engine(bench, "packed")

    def run(ill: bool) -> Tensors:
        start = trees.expand({n: p.detach() + 0.01 for n, p in bench.loaded.initial.items()}, 3)
        if ill:
            for value in start.values():
                value[1] = float("nan")
        return cohort.train(1, data, start, {}, None).params

    well, ill = run(False), run(True)
    for name in well:
        assert torch.equal(well[name][[0, 2]], ill[name][[0, 2]])
        assert not torch.isfinite(ill[name][1]).all()


def test_a_correction_finds_each_client_under_its_row(job: Job) -> None:
    """Pull each client to its own target (FedProx's form): rows leave the block early and stand in another order."""
    bench = double(set_up(prepare(job)))
    data = {name: list(rows)[: 2 + k] for k, (name, rows) in enumerate(data_of(bench).items())}
    cohort = engine(bench, "packed", batch=1, epochs=2)

    def pulled(names: list[str]) -> dict[str, Tensors]:
        target = trees.stack(
            {n: p.detach() + 0.1 * list(data).index(name) for n, p in bench.loaded.initial.items()} for name in names
        )

        def towards(grads: Tensors, params: Tensors, rows: torch.Tensor) -> Tensors:
            return {n: grad + 5 * (params[n] - target[n][rows]) for n, grad in grads.items()}

        out = cohort.train(1, {name: data[name] for name in names}, target, {}, towards)
        return {name: trees.pick(out.params, k) for k, name in enumerate(names)}

    together = pulled(list(data))
    alone = {name: pulled([name])[name] for name in data}
    assert apart(together, alone) < 1e-7


def recipe(**changes: Any) -> Recipe:
    base = {
        "optimizer": "adamw", "lr": 1.0, "batch": 2, "accumulate": 1, "epochs": 1, "steps": None, "warmup": 0.0,
        "schedule": "constant", "clip": None, "weight_decay": 0.0, "momentum": 0.0, "moments": "reset",
        "checkpointing": False, "rounds": 10,
    }  # fmt: skip
    return Recipe(**{**base, **changes})  # type: ignore[arg-type]


def test_schedule_by_hand() -> None:
    """Linear from 1 at a warm-up of 0.2: 0.1/0.2 = 0.5 on the way up, 1 - (0.6-0.2)/0.8 = 0.5 on the way down."""
    linear = recipe(schedule="linear", warmup=0.2)
    assert [linear.rate(done) for done in (0.0, 0.1, 0.2, 0.6)] == pytest.approx([0.0, 0.5, 1.0, 0.5])
    cosine = recipe(schedule="cosine")
    assert [cosine.rate(done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert recipe().rate(0.99) == 1.0


def test_batches_cover_every_epoch_once_and_depend_on_their_address() -> None:
    rows = batches(5, recipe(epochs=2), 0, 1, "a")
    assert [len(row) for row in rows] == [2, 2, 1, 2, 2, 1]
    assert sorted(chain(*rows[:3])) == sorted(chain(*rows[3:])) == [0, 1, 2, 3, 4]
    assert rows[:3] != rows[3:]
    assert batches(5, recipe(epochs=2), 0, 1, "b") != rows
    assert [len(row) for row in batches(5, recipe(steps=4), 0, 1, "a")] == [2, 2, 1, 2]


@pytest.mark.parametrize(
    ("name", "decay", "momentum"), [("adamw", 0.0, 0.0), ("adamw", 0.1, 0.0), ("sgd", 0.0, 0.0), ("sgd", 0.1, 0.9)]
)
def test_optimizers_equal_torch_row_by_row(name: Any, decay: float, momentum: float) -> None:
    """Two clients with rates 0.1 and 0.01, three steps, against torch.optim on each row."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, generator=draw, dtype=torch.float64)
    grads = torch.randn(3, 2, 5, generator=draw, dtype=torch.float64)
    rates = torch.tensor([[0.1], [0.01]], dtype=torch.float64)
    ours, optimizer = start.clone(), Optimizer(name, decay, momentum)
    moments = optimizer.start(ours)
    for grad in grads:
        optimizer.step(ours, grad.clone(), moments, rates)
    for row in range(2):
        theirs = start[row].clone().requires_grad_()
        plain: torch.optim.Optimizer = (
            torch.optim.AdamW([theirs], lr=float(rates[row]), weight_decay=decay)
            if name == "adamw"
            else torch.optim.SGD([theirs], lr=float(rates[row]), weight_decay=decay, momentum=momentum)
        )
        for grad in grads:
            theirs.grad = grad[row].clone()
            plain.step()
        assert torch.allclose(ours[row], theirs, atol=1e-12)
