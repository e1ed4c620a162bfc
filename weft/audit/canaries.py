"""Audit a finished run's job: train it once more with canaries put in by fair coins, and guess which were in.

Canaries are test records, so they are real text of the task, and nobody's adapter is touched: the run with canaries
stands in `audit/` of the run folder and is for this attack alone. A canary's score is how much its loss fell from the
base to the final adapter; a repeated canary is learned better and is still one coin. What comes out is a lower bound on
epsilon for one canary: it can disprove a promise and never prove one. The coins come from the system's random bytes.
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft import prepare
from weft.audit.one_run import Audit, audit
from weft.core.errors import JobError
from weft.core.metrics import added
from weft.core.task import Example
from weft.core.types import Tensors
from weft.runs import Run, run_prepared
from weft.site.site import Site
from weft.store import Store

LEAST = 20  # canaries, below which no guess says anything


def audit_run(run: Run, most: int = 1000, repeat: int = 1) -> dict[str, Any]:
    """Return what guessing proves of a run's job, ready for JSON.

    most: canaries. repeat: how often a canary that is in stands in the training records; an epsilon of single records
    then holds for `repeat` times as much. Raise JobError for a run that cannot be audited so.
    """
    claimed = run.results.get("privacy", [])
    prepared = prepare.prepare(run.job)
    if prepared.plan.algorithm.personal:
        raise JobError(
            f"{prepared.job.algorithm.name} gives each client an adapter of its own; an audit needs one of all"
        )
    if not prepared.task.per_example:
        raise JobError(f"{prepared.job.task.name} compares records with each other; a canary has no loss of its own")
    if len(prepared.test.records) < LEAST:
        raise JobError(f"data.test: {len(prepared.test.records)} records are too few canaries; an audit needs {LEAST}")
    chosen = sorted(
        secrets.SystemRandom().sample(range(len(prepared.test.records)), min(most, len(prepared.test.records)))
    )
    coins = [bool(secrets.randbits(1)) for _ in chosen]
    planted = with_canaries(prepared, [i for i, coin in zip(chosen, coins, strict=True) if coin], repeat)
    folder = run.folder / "audit"
    shutil.rmtree(folder, ignore_errors=True)
    bench = prepare.set_up(planted)
    run_prepared(folder, bench)
    scores = fallen(folder, bench, chosen)
    delta = prepared.job.privacy.delta
    return told(audit(scores, torch.tensor(coins), delta), delta, repeat, claimed)


def with_canaries(prepared: prepare.Prepared, inside: Sequence[int], repeat: int) -> prepare.Prepared:
    """Return a job with some test records among the training records, dealt to the clients in turn."""
    records = [dict(prepared.test.records[i]) for i in inside for _ in range(repeat)]
    first, names = len(prepared.train.records), list(prepared.clients)
    clients = {name: list(places) for name, places in prepared.clients.items()}
    for k in range(len(records)):
        clients[names[k // repeat % len(names)]].append(first + k)
    train = replace(prepared.train, records=[*prepared.train.records, *records])
    job = prepared.job.model_copy(
        update={"baselines": (), "evaluate": prepared.job.evaluate.model_copy(update={"every": 0})}
    )
    return replace(prepared, job=job, train=train, clients=clients)


def fallen(folder: Path, bench: prepare.Bench, chosen: Sequence[int]) -> Tensor:
    """Return how far each canary's loss fell from the first adapter to the last, (canaries,)."""
    prepared, site = bench.prepared, bench.site(folder, "federated", 1, lambda text: None)
    server, _ = Store(folder, prepared.job.hash()).latest()
    assert server is not None
    algorithm = prepared.plan.algorithm
    last = algorithm.serve(server.state, algorithm.keep(site.initial), site.initial)
    records = [prepared.test.records[i] for i in chosen]
    rows = [prepared.task.encode(bench.loaded.tokenizer, [record], prepared.classes).examples for record in records]
    return torch.tensor([_loss(site, site.initial, row) - _loss(site, last, row) for row in rows])


def _loss(site: Site, adapter: Tensors, rows: Sequence[Example]) -> float:
    """Return the loss of a record; 0 for one that nothing is left of."""
    if not rows:
        return 0.0
    return float(site.plan.task.summarize(added(site.measure(adapter, rows, ("loss",))))["loss"])


def told(found: Audit, delta: float, repeat: int, claimed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the audit beside the claim, and whether they agree."""
    own = [row["epsilon"] for row in claimed if row["level"] == "record" and row["unit"] == "one record"]
    claim = repeat * own[0] if own else None
    return {
        **asdict(found),
        "delta": delta,
        "repeat": repeat,
        "claimed": claim,
        "disproved": claim is not None and found.epsilon > claim,
    }
