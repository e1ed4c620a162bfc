"""Personal rules on a real model: what they hold loads in plain peft, each client's own adapter too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import weft
from tests.algorithms.test_lora_rules_run import Stop, Stopping
from tests.conftest import EXAMPLES
from weft import Job
from weft.core import trees
from weft.core.errors import JobError
from weft.core.metrics import added
from weft.export import export
from weft.prepare import prepare, set_up
from weft.site.block import BlockWork
from weft.store import Store

MODEL = EXAMPLES / "models" / "stories260K"
RULES: dict[str, Any] = {
    "ifca": {"ifca": {"clusters": 2}},
    "task_experts": {"task_experts": {"tasks": {"even": ["site-[02]"], "odd": ["site-1"]}}},
    "fed_dpa": "fed_dpa",
    "ditto": "ditto",
    "fedsa_lora": "fedsa_lora",
}
IDS = torch.tensor([[1, 9, 8, 7, 3]])


def logits(folder: Path) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder).eval()
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", RULES)
def test_a_run(rule: str, values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"algorithm": RULES[rule], "rounds": 2, "baselines": []}
    run = weft.run(Job(**values), tmp_path / "run")
    bench = set_up(prepare(run.job))
    site = bench.site(run.folder, "federated", 0, lambda text: None)
    server, _ = Store(run.folder, run.job.hash()).latest()
    assert server is not None
    for client in ("site-0", "site-1"):
        used = site.used(server, client)
        with torch.no_grad(), bench.loaded.holding(used) as net:
            ours = net(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        theirs = logits(export(run, tmp_path / client, merge=False, client=client))
        assert float((theirs - ours).abs().max()) <= 1e-5
    assert float((logits(tmp_path / "site-0") - logits(tmp_path / "site-1")).abs().max()) > 1e-4 or rule == "ifca"
    more = sorted(path.name for path in (run.folder / "adapters").glob("*")) if rule in ("ifca", "task_experts") else []
    assert more == {"ifca": ["cluster-0", "cluster-1"], "task_experts": ["even", "odd"]}.get(rule, [])
    for name in more:
        assert torch.isfinite(logits(run.folder / "adapters" / name)).all()
    if rule == "task_experts":
        assert torch.equal(logits(run.folder / "adapters" / "odd"), logits(tmp_path / "site-1"))


def test_a_merged_model_of_one_client(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"algorithm": "fed_dpa", "rounds": 1, "baselines": []}
    run = weft.run(Job(**values), tmp_path / "run")
    plain = logits(export(run, tmp_path / "own", merge=False, client="site-2"))
    whole = export(run, tmp_path / "whole", merge=True, client="site-2")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(whole).eval()(IDS).logits
    assert float((merged - plain).abs().max()) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["own", "run", "whole"]


def test_a_client_that_is_none_or_has_nothing_of_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    run = weft.run(Job(**{**values, "algorithm": "ditto", "rounds": 1, "baselines": []}), tmp_path / "run")
    with pytest.raises(JobError, match="--client site-9: is no client of this run; did you mean `site-"):
        export(run, tmp_path / "x", merge=False, client="site-9")
    plain = weft.run(Job(**{**values, "rounds": 1, "baselines": []}), tmp_path / "plain")
    with pytest.raises(JobError, match="--client: all clients of fedavg use one adapter"):
        export(plain, tmp_path / "x", merge=False, client="site-1")
    assert not (tmp_path / "x").exists()


def test_the_loss_that_a_client_chooses_by(values: dict[str, Any], tmp_path: Path) -> None:
    """The mean over all its tokens, as the task measures it; the same whatever else is in the block."""
    bench = set_up(prepare(Job(**values)))
    site = bench.site(tmp_path, "federated", 0, lambda text: None)
    first = {name: value + 0.1 * torch.ones(()) for name, value in site.initial.items()}
    names = list(site.train)
    works = [
        BlockWork(site.cohort, 1, {name: site.train[name] for name in chosen}, {}, torch.zeros(len(chosen)))
        for chosen in (names, *[[name] for name in names])
    ]
    together = works[0].loss(trees.expand(first, len(names)))
    alone = torch.cat([work.loss(trees.expand(first, 1)) for work in works[1:]])
    assert torch.equal(together, alone)
    for name, loss in zip(names, together.tolist(), strict=True):
        sums = added(site.measure(first, site.train[name], ("loss",)))
        assert loss == pytest.approx(site.plan.task.summarize(sums)["loss"], rel=1e-5)


@pytest.mark.parametrize("rule", ["ifca", "fed_dpa"])
def test_a_stopped_run_ends_with_the_same_bytes(rule: str, values: dict[str, Any], tmp_path: Path) -> None:
    job = Job(**{**values, "algorithm": RULES[rule], "clients": {"per_round": 2}})
    whole = weft.run(job, tmp_path / "whole")
    with pytest.raises(Stop):
        weft.run(job, tmp_path / "stopped", watch=Stopping())
    again = weft.run(job, tmp_path / "stopped", resume=True)
    assert whole.results["methods"] == again.results["methods"]
