"""The baselines keep to clients.ranks, and are the same whatever the job's algorithm is."""

from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft import Job
from weft.core.errors import KeyProblem
from weft.prepare import prepare
from weft.store import Store

RULES = ("flora", "hetlora")


def final(run: weft.Run, method: str) -> Any:
    server, _ = Store(run.folder / "baselines" / method, run.job.hash()).latest()
    return server


def used(tensors: dict[str, torch.Tensor]) -> set[int]:
    """Return the ranks whose product is not zero."""
    return {
        int(((tensors[n.replace("lora_A", "lora_B")] != 0).any(0) & (value != 0).any(1)).sum())
        for n, value in tensors.items()
        if "lora_A" in n
    }


def job(values: dict[str, Any], rule: str, ranks: dict[str, int]) -> Job:
    values = {**values, "algorithm": rule, "clients": {"ranks": ranks}, "baselines": ["local", "centralized"]}
    return Job(**{**values, "rounds": 1, "adapter": {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]}}})


def test_ranks_of_the_baselines(values: dict[str, Any], tmp_path: Path) -> None:
    """site-0 has 1 rank, the others 2, of the adapter's 4: alone they train as many, the pooled one the most, 2."""
    from safetensors.torch import load_file

    run = weft.run(job(values, "hetlora", {"site-0": 1, "default": 2}), tmp_path / "run")
    for name, ranks in (("site-0", 1), ("site-1", 2)):
        kept = load_file(run.folder / "baselines" / "local" / "clients" / name / "000001.safetensors")
        assert used(kept) == {ranks}
    assert used(final(run, "centralized").state["adapter"]) == {2}


def test_the_algorithm_changes_no_baseline(values: dict[str, Any], tmp_path: Path) -> None:
    runs = [weft.run(job(values, rule, {}), tmp_path / rule) for rule in ("fedavg", *RULES)]
    states = [final(run, "centralized").state["adapter"] for run in runs]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    losses = [run.results["methods"]["local"]["overall"]["loss"] for run in runs]
    assert len(set(losses)) == 1


def test_one_rank_for_all_that_is_not_the_adapters_is_mixed_too(values: dict[str, Any]) -> None:
    """Fedavg would train all 4 ranks and never say that clients.ranks was ignored."""
    with pytest.raises(KeyProblem, match="fedavg needs one rank for all clients"):
        prepare(job(values, "fedavg", {"default": 2}))
    prepare(job(values, "fedavg", {"default": 4}))
