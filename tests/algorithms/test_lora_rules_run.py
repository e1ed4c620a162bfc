"""The LoRA rules on a real model: the loss falls, exact ones are exact, and plain peft loads what is served."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weft
from tests.conftest import EXAMPLES
from tests.test_runs import CLASSIFY
from weft import Job, Run, plugins
from weft.core.round import run_round
from weft.core.types import Algorithm, Question, Server, Tensors
from weft.journal import read as read_journal
from weft.links.local import Local
from weft.prepare import Bench, prepare, set_up
from weft.store import Store
from weft.watch import Watch

MODEL = EXAMPLES / "models" / "stories260K"
MIXED = {"site-0": 1, "default": 2}
EXACT = ("ffa_lora", "rolora", "fedex_lora", "flora")
RULES: dict[str, dict[str, Any]] = {
    "ffa_lora": {},
    "rolora": {},
    "fedex_lora": {},
    "flora": {"ranks": MIXED, "rslora": True},
    "flexlora": {"ranks": MIXED},
    "hetlora": {"ranks": MIXED},
    "lora_fair": {},
    "frlora": {"rslora": True},
    "flasc": {"keys": {"lr": 0.02}},
    "fedsa_lora": {},
    "local_heads": {"keys": {"stays": ["*.layers.0.*"]}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_of(values: dict[str, Any], rule: str, how: dict[str, Any]) -> Job:
    lora = {**values["adapter"]["lora"], "rslora": how.get("rslora", False)}
    clients = {"ranks": how["ranks"]} if "ranks" in how else {}
    return Job(**{**values, "adapter": {"lora": lora}, "clients": clients, "algorithm": {rule: how.get("keys", {})}})


def served(run: Run, bench: Bench) -> tuple[Algorithm, Server, Tensors]:
    """Return what a client that was never asked uses after the last round."""
    algorithm: Algorithm = plugins.build(run.job.algorithm, "algorithm")
    server, _ = Store(run.folder, run.job.hash()).latest()
    assert server is not None
    first = {name: tensor.detach() for name, tensor in bench.loaded.initial.items()}
    return algorithm, server, algorithm.serve(server.state, algorithm.keep(first), first)


@pytest.mark.parametrize("rule", RULES)
def test_a_run(rule: str, values: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    job = job_of(values, rule, RULES[rule])
    run = weft.run(job, tmp_path / "run")
    bench = set_up(prepare(job))
    algorithm, server, adapter = served(run, bench)
    losses = {name: rows["overall"]["loss"] for name, rows in run.results["methods"].items()}
    assert losses["federated"] < losses["untrained"] - 0.02
    rows = read_journal(run.folder / "journal.jsonl")[1:]
    errors = [row["aggregation_error"] for row in rows]
    if algorithm.personal:
        assert errors == [None] * 3
    else:
        assert all(error < 1e-6 for error in errors) == (rule in EXACT), errors
    ids = AutoTokenizer.from_pretrained(MODEL)("Question: What is gout?\nAnswer:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(MODEL)
        untrained = base(ids).logits
        theirs = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
        with bench.loaded.holding(adapter) as net:
            ours = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert float((theirs(ids).logits - ours).abs().max()) <= 1e-5
        assert float((theirs.merge_and_unload()(ids).logits - ours).abs().max()) <= 1e-4
    if rule != "fedsa_lora":  # the first B is zero
        assert float((untrained - ours).abs().max()) > 1e-2
    grown = {len(value) for name, value in adapter.items() if "lora_A" in name}
    assert (grown != {2}) == (rule in ("fedex_lora", "flora", "frlora"))
    assert server.round == 3


def test_fedavg_is_not_exact(values: dict[str, Any], tmp_path: Path) -> None:
    run = weft.run(job_of({**values, "rounds": 1}, "fedavg", {}), tmp_path / "run")
    assert read_journal(run.folder / "journal.jsonl")[1]["aggregation_error"] > 1e-3


@pytest.mark.parametrize("rule", ["flora", "flexlora", "hetlora"])
def test_a_client_of_half_the_rank_sends_half_the_bytes(rule: str, values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"rounds": 1, "baselines": []}
    values["adapter"]["lora"]["rank"] = 8
    run = weft.run(job_of(values, rule, {"ranks": {"site-0": 4, "default": 8}}), tmp_path / "run")
    sent = {name: row["bytes_up"] for name, row in read_journal(run.folder / "journal.jsonl")[1]["clients"].items()}
    assert sent["site-1"] == sent["site-2"]
    assert 0.4 < sent["site-0"] / sent["site-1"] < 0.65  # names and shapes travel as well


@pytest.mark.parametrize("rule", ["fedex_lora", "flora", "frlora"])
def test_what_rests_stays_under_adamw_and_clipping(rule: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit through the engine: the ranks in front of those that a client trains."""
    job = job_of(values, rule, {})
    bench = set_up(prepare(job))
    site = bench.site(tmp_path, "federated", 0, lambda text: None)
    seen = []
    train = site.cohort.train

    def watched(round_: int, clients: Any, start: Tensors, *rest: Any) -> Any:
        trained = train(round_, clients, start, *rest)
        seen.append((start, trained.params))
        return trained

    site.cohort.train = watched  # type: ignore[method-assign]
    link = Local([site])
    first = link.ask(Question("describe", {"base": "x"}))[0]["adapter"]
    federation = replace(bench.federation("federated"), initial=first)
    server = Server(federation.algorithm.init(first))
    for _ in range(2):
        server, _ = run_round(server, federation, link)
    start, ended = seen[-1]
    for name in (name for name in start if "lora_A" in name):
        rests = start[name].shape[1] - 2
        assert rests > 0
        assert torch.equal(start[name][:, :rests], ended[name][:, :rests])
        assert not torch.equal(start[name][:, rests:], ended[name][:, rests:])


@pytest.mark.parametrize("rule", ["local_heads", "fedsa_lora", "ffa_lora", "flora"])
def test_a_classifier_with_a_head(rule: str, tmp_path: Path) -> None:
    from peft import PeftModel

    run = weft.run(Job(**{**CLASSIFY, "algorithm": rule, "evaluate": {"every": 0}}), tmp_path / "run")
    bench = set_up(prepare(run.job))
    algorithm, server, adapter = served(run, bench)
    shared = server.state["adapter"]
    assert any("modules_to_save" in name for name in shared) == (not algorithm.personal)
    base, _ = run.base()
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    with torch.no_grad(), bench.loaded.holding(adapter) as net:
        ours = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        theirs = PeftModel.from_pretrained(base, run.folder / "adapter").eval()(input_ids=ids).logits
    assert float((theirs - ours).abs().max()) <= 1e-5


@pytest.mark.parametrize("rule", ["flora", "frlora"])
def test_a_pissa_start_is_saved_for_the_plain_base(rule: str, values: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    values["adapter"]["lora"]["init"] = "pissa"
    run = weft.run(job_of({**values, "rounds": 2}, rule, {}), tmp_path / "run")
    bench = set_up(prepare(run.job))
    _, _, adapter = served(run, bench)
    ids = torch.tensor([[1, 9, 8, 7, 3]])
    with torch.no_grad(), bench.loaded.holding(adapter) as net:
        ours = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        base = AutoModelForCausalLM.from_pretrained(MODEL)
        theirs = PeftModel.from_pretrained(base, run.folder / "adapter").eval()(ids).logits
    assert float((theirs - ours).abs().max()) <= 1e-4
    losses = {name: rows["overall"]["loss"] for name, rows in run.results["methods"].items()}
    assert losses["federated"] < losses["untrained"]


class Stop(Exception):
    pass


class Stopping(Watch):
    def round(self, method: str, number: int, row: dict[str, Any]) -> None:
        if number == 2:
            raise Stop


@pytest.mark.parametrize("rule", ["flora", "hetlora"])
def test_a_stopped_run_ends_with_the_same_bytes(rule: str, values: dict[str, Any], tmp_path: Path) -> None:
    """With a state that grows, with draws of each round, and with ranks that clients keep."""
    keys = {"strength": 3.0} if rule == "hetlora" else {}
    job = job_of(values, rule, {"ranks": MIXED, "keys": keys})
    whole = weft.run(job, tmp_path / "whole")
    with pytest.raises(Stop):
        weft.run(job, tmp_path / "stopped", watch=Stopping())
    again = weft.run(job, tmp_path / "stopped", resume=True)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes()
