"""Plans from configs alone, against published counts, and against the engine where it fits this machine."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import weft
from tests.conftest import EXAMPLES
from weft import Job, journal, plugins
from weft.core.errors import JobError
from weft.job import Dp, Local, Privacy
from weft.links import wire
from weft.plan.counts import compared, shapes_of, whole
from weft.plan.live import Live
from weft.plan.memory import Memory, Shape, memory
from weft.plan.plan import plan
from weft.plan.show import show
from weft.plan.skeleton import on_meta, skeleton
from weft.plan.traffic import traffic
from weft.prepare import prepare
from weft.site.cohort import Cohort, Layout
from weft.site.model import equip
from weft.site.recipe import Recipe
from weft.spending import told
from weft.tasks.causal_lm import causal_lm

CONFIGS = Path(__file__).parent / "configs"
LLAMA = transformers.LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
)


def job_of(name: str, targets: list[str]) -> Job:
    return Job(
        model={"name": str(CONFIGS / name)},
        adapter={"lora": {"rank": 8, "targets": targets}},
        task={"causal_lm": {"max_length": 64}},
        data={"train": "none.jsonl", "split": {"iid": {"clients": 4}}},
        local={"batch": 1},
    )


@pytest.mark.parametrize(
    ("name", "targets", "trained", "total"),
    [
        ("llama-2-7b", ["q_proj", "v_proj"], 4_194_304, 6_738_415_616),
        ("bloom-7b1", ["query_key_value"], 3_932_160, 7_069_016_064),
        ("chatglm-6b", ["query_key_value"], 3_670_016, 6_173_294_592),
        ("llama-2-70b", ["q_proj", "v_proj"], 16_384_000, 68_976_648_192),
    ],
)
def test_published_counts(name: str, targets: list[str], trained: int, total: int) -> None:
    """Rank 8: LLaMA-2-7B 32 x 2 x 8 x (4096 + 4096); Bloom-7b1 30 x 8 x (4096 + 12288); ChatGLM-6B 28 x as much.

    70B: 80 x 8 x ((8192 + 8192) + (8192 + 1024)). Bloom published with LoRA: 7,072,948,224 = 7,069,016,064 + 3,932,160.
    """
    found = plan(job_of(name, targets))
    assert (found.own.trained, found.own.total) == (trained, total)
    assert found.memory.base >= 4 * total
    assert found.per_round is None
    assert any("not read" in note for note in found.notes)


def test_chatglm_says_who_stands_for_it() -> None:
    notes = " ".join(plan(job_of("chatglm-6b", ["query_key_value"])).notes)
    assert "Bloom" in notes
    assert "8,192" in notes  # one layer norm: a weight and a bias of 4096


def test_small_models_say_what_a_deep_one_has() -> None:
    """Counts by two small models equal those of the whole; with a target that is one layer's alone they would not."""
    task = causal_lm()
    names = {count.name: count for count in compared(LLAMA, task, 0)}
    for name, choice in (("ia3", "ia3"), ("prefix, 20 tokens", {"prefix": {"tokens": 20}}), ("full", "full")):
        adapter = plugins.build(plugins.parse("adapter", choice), "adapter")
        shapes = shapes_of(on_meta(LLAMA, task, 0, "float32"), adapter, task)
        assert names[name].trained == sum(torch.Size(shape).numel() for shape in shapes.values())
        assert names[name].bytes == pytest.approx(whole(shapes), rel=1e-2)
    assert "biases" in names["bitfit"].reason


def test_bytes_are_those_of_a_run(job: Job, tmp_path: Path) -> None:
    """The journal's measured bytes of a client, up and down, are the plan's and two heads, 200 to 400 bytes each."""
    found = plan(job)
    run = weft.run(job.model_copy(update={"rounds": 1}), tmp_path / "run", threads=1)
    row = journal.read(run.folder / "journal.jsonl")[-1]
    for client in row["clients"].values():
        assert 200 < client["bytes_up"] - found.traffic.up < 400
        assert 200 < client["bytes_down"] - found.traffic.down < 400
    assert found.own.trained == run.results["adapter"]["trainable"]
    assert found.per_round == 3
    assert found.in_all == 3 * 3 * (found.traffic.up + found.traffic.down)


@pytest.mark.parametrize(("name", "up", "down"), [("fedavg", 1.0, 1.0), ("scaffold", 2.0, 2.0), ("ffa_lora", 0.5, 0.5)])
def test_an_algorithm_decides_what_travels(name: str, up: float, down: float) -> None:
    """SCAFFOLD sends a control variate beside each adapter; FFA-LoRA one factor, half of a square layer's numbers."""
    shapes = {
        f"layer.{i}.lora_{half}.weight": shape for i in range(4) for half, shape in (("A", (8, 256)), ("B", (256, 8)))
    }
    algorithm = plugins.build(plugins.parse("algorithm", name), "algorithm")
    found, one = traffic(algorithm, shapes, ["weigh"]), whole(shapes)
    assert found.note == ""
    assert found.up == pytest.approx(up * one, rel=0.05)
    assert found.down == pytest.approx(down * one, rel=0.05)


def test_a_message_has_the_length_of_the_wire() -> None:
    tensors = {f"a.{i}.weight": torch.zeros(3, i + 1) for i in range(12)}
    assert whole({name: tuple(t.shape) for name, t in tensors.items()}) == len(wire.seal({"adapter": tensors}))


# --- memory


def shape(adapter: Any, batch: int = 2, tokens: int = 48, **recipe: Any) -> Shape:
    ids = torch.randint(5, 500, (tokens,), generator=torch.Generator().manual_seed(0))
    example = {"ids": ids, "labels": ids, "prompt": 0}
    keys = {"optimizer": "adamw", "lr": 1e-4, "batch": batch, "accumulate": 1, "epochs": 1, "steps": 1,
            "schedule": "constant", "warmup": 0.0, "clip": 1.0, "weight_decay": 0.0, "momentum": 0.0,
            "moments": "reset", "checkpointing": False, "rounds": 1}  # fmt: skip
    made = plugins.build(plugins.parse("adapter", adapter), "adapter")
    return Shape(made, causal_lm(), Recipe(**{**keys, **recipe}), "float32", 0, [example] * batch)


def living(given: Shape) -> int:
    """Return the most bytes that live in a real step, values and all."""
    net = skeleton(LLAMA, given.task, 0, "float32")
    loaded = equip(net, None, given.adapter, given.task, 0, checkpointing=given.recipe.checkpointing)
    engine = Cohort(loaded, given.task, given.recipe, 0, "packed", loaded.lift)
    live = Live()
    for tensor in [*loaded.net.parameters(), *loaded.net.buffers()]:
        live.count(tensor)
    start = {name: p.detach()[None].clone() for name, p in loaded.initial.items()}
    with live:
        layout = Layout({name: tuple(p.shape[1:]) for name, p in start.items()})
        params = layout.flat(start).requires_grad_()
        engine.optimizer.start(params)
        engine.loaded.net.train()
        engine.losses(layout.named(params), [given.examples], [0])
    return live.most


@pytest.mark.parametrize("keys", [{}, {"batch": 6}, {"tokens": 96}, {"checkpointing": True}])
def test_what_would_live_is_what_lives(keys: dict[str, Any]) -> None:
    """A step without values holds what a real one does, from six layers out of two and four, to three hundredths."""
    given = shape({"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}}, **keys)
    planned = memory(LLAMA, given)
    assert planned.total - planned.allocator == pytest.approx(living(given), rel=0.03)


def test_an_adapter_of_certain_layers_is_planned() -> None:
    """Models of a few layers lack them, so the whole is run; what is kept of the layers below is said."""
    given = shape({"lora": {"rank": 4, "targets": ["layers.5.self_attn.q_proj"]}})
    planned = memory(LLAMA, given)
    assert planned.total - planned.allocator == pytest.approx(living(given), rel=0.03)
    with pytest.raises(JobError, match=r"layers\.9"):
        memory(LLAMA, shape({"lora": {"targets": ["layers.9.self_attn.q_proj"]}}))
    one, all_ = (plan(job_of("llama-2-7b", [target])).notes for target in ("layers.30.mlp.up_proj", "up_proj"))
    assert any("30 frozen layers below the adapter" in note for note in one)
    assert not any("frozen layers" in note for note in all_)


def test_memory_follows_what_decides_it() -> None:
    """Twice the examples, twice the activations; checkpointing fewer; Adam keeps two numbers a parameter."""
    one, two, less, full = (
        memory(LLAMA, shape(adapter, **keys))
        for adapter, keys in (("ia3", {}), ("ia3", {"batch": 4}), ("ia3", {"checkpointing": True}), ("full", {}))
    )
    assert two.activations == pytest.approx(2 * one.activations, rel=0.05)
    assert less.activations < 0.7 * one.activations
    assert full.optimizer == pytest.approx(2 * full.base, rel=0.01)
    assert isinstance(one, Memory)


def test_a_probe_takes_real_steps(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(job, probe=True)
    assert found.seconds is not None
    assert found.seconds > 0
    show(found, budget=1.0)
    printed = capsys.readouterr().out
    assert "of the budget" in printed
    assert f"{found.own.trained:,}" in printed


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"model\.name"):
        plan(job_of("llama-2-7b", ["q_proj"]).model_copy(update={"model": weft.job.Model(name=str(tmp_path))}))


def test_an_example_is_planned() -> None:
    found = plan(weft.load(EXAMPLES / "medquad.yaml"))
    assert found.own.trained == 92_480
    assert max(found.lengths) == 112


def test_pairs_are_planned_with_what_the_base_says_of_them() -> None:
    """DPO reads chosen and rejected: both count as labelled, and the loss has its reference."""
    found = plan(weft.load(EXAMPLES / "preference.yaml"))
    assert found.own.trained == 92_480
    assert found.memory.activations > 0
    assert found.epsilon.startswith("none")


def test_epsilon_is_the_one_that_check_tells() -> None:
    """Epsilon of the whole run, by the same account; memory says that it leaves per-example gradients out."""
    path = EXAMPLES / "medquad.yaml"
    private = Local(clip=None, dp=Dp(clip=1.0, noise=1.0))
    job = weft.load(path).model_copy(update={"local": private, "privacy": Privacy(delta=1e-5)})
    found = plan(job)
    prepared = prepare(job)
    (sentence,) = told(prepared.account(), prepared.federation(), job.rounds)
    assert found.epsilon == sentence.removeprefix("privacy: ")
    assert "will spend epsilon" in found.epsilon
    assert any("local.dp" in note for note in found.notes)
