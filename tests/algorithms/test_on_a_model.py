"""The rules on a real model: rows of a block that shrinks, each client's own steps, jobs that are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.algorithms import reference
from weft import Job
from weft.core import trees
from weft.core.errors import JobError
from weft.core.round import run_round
from weft.core.types import Server, State
from weft.links.local import Local
from weft.prepare import prepare, set_up
from weft.site.site import Site
from weft.testing.sound import bits

SGD = {"optimizer": "sgd", "lr": 0.05}


def rounds(
    values: dict[str, Any], folder: Path, algorithm: Any, *, local: dict[str, Any], block: int = 3, count: int = 2
) -> tuple[Server, Site]:
    """Run some rounds of the small job, three clients with 3, 3 and 2 steps, without evaluation or report."""
    job = Job(**{**values, "algorithm": algorithm, "local": {**values["local"], **local}})
    bench = set_up(prepare(job))
    site = bench.site(folder, "federated", block, lambda text: None)
    federation = replace(bench.federation("federated"), initial=site.initial)
    server = Server(federation.algorithm.init(site.initial))
    for _ in range(count):
        server, _ = run_round(server, federation, Local([site]))
    return server, site


JOBS = [
    ("fedavgm", {}),
    ("fedprox", {}),
    ("fedadam", {}),
    ("fedyogi", {}),
    ("fedadagrad", {}),
    ("scaffold", SGD),
    ("fednova", {**SGD, "momentum": 0.5}),
    ({"fednova": {"heuristic": True}}, {}),
    ("median", {}),
    ("trimmed_mean", {}),
    ({"krum": {"byzantine": 0}}, {}),
    ({"multi_krum": {"byzantine": 0}}, {}),
    ("geometric_median", {}),
    ({"norm_bound": {"norm": 0.1}}, {}),
    ("ditto", {}),
]


@pytest.mark.parametrize(("algorithm", "local"), JOBS, ids=str)
def test_it_trains(values: dict[str, Any], tmp_path: Path, algorithm: Any, local: dict[str, Any]) -> None:
    server, site = rounds(values, tmp_path, algorithm, local=local)
    assert not trees.not_finite(server.state)
    assert not trees.difference({"adapter": server.state["adapter"]}, {"adapter": site.initial})
    moved = trees.subtract(server.state["adapter"], site.initial)
    assert all(bool(value.any()) for value in moved.values())


@pytest.mark.parametrize("neutral", [{"fedprox": {"mu": 0.0}}, {"fedavgm": {"momentum": 0.0}}])
def test_a_neutral_rule_has_the_bits_of_fedavg(values: dict[str, Any], tmp_path: Path, neutral: Any) -> None:
    one, _ = rounds(values, tmp_path / "one", neutral, local={})
    other, _ = rounds(values, tmp_path / "other", "fedavg", local={})
    assert bits(one.state["adapter"]) == bits(other.state["adapter"])


@pytest.mark.parametrize(
    ("algorithm", "local"), [({"fedprox": {"mu": 5.0}}, SGD), ("scaffold", SGD), ({"ditto": {"mu": 5.0}}, SGD)], ids=str
)
def test_the_block_changes_nothing(
    values: dict[str, Any], tmp_path: Path, algorithm: Any, local: dict[str, Any]
) -> None:
    """A correction by row must follow its client while others leave the block."""
    assert apart(values, tmp_path, algorithm, local) < 1e-5


def apart(values: dict[str, Any], folder: Path, algorithm: Any, local: dict[str, Any]) -> float:
    """Return how far three rounds one by one are from three rounds in one block."""
    servers = [rounds(values, folder / str(size), algorithm, local=local, block=size, count=3)[0] for size in (1, 3)]
    one, other = (trees.flatten(server.state) for server in servers)
    return reference.far(one, reference.wide(other))


def test_a_row_of_another_client_is_caught(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the first rows of the stack in place of those that are asked for."""
    monkeypatch.setattr(trees, "by_rows", lambda tree: lambda rows: {n: v[: len(rows)] for n, v in tree.items()})
    assert apart(values, tmp_path, "scaffold", SGD) > 1e-4


def kept(site: Site, server: Server) -> dict[str, State]:
    return {name: site.memory.load(name, round_) for name, round_ in server.since.items()}


def test_scaffold_keeps_its_mean(values: dict[str, Any], tmp_path: Path) -> None:
    """C is the mean of all c_k in the weights of the pipeline, and the c_k are unlike."""
    server, site = rounds(values, tmp_path, "scaffold", local=SGD, count=3)
    controls = {name: reference.wide(state["control"]) for name, state in kept(site, server).items()}
    sizes = {name: float(len(rows)) for name, rows in site.train.items()}
    mean = reference.mean(controls, sizes)
    assert reference.far(server.state["control"], mean) < 1e-6
    largest = max(float(value.abs().max()) for value in mean.values())
    assert max(reference.far(row, mean) for row in controls.values()) > 0.1 * largest > 0


def test_one_step_of_scaffold_keeps_the_gradient(values: dict[str, Any], tmp_path: Path) -> None:
    """With one full-batch step c_k is the gradient, so y = w - lr c_k, and w is their mean: w0 - lr c."""
    local = {**SGD, "batch": 8, "clip": None}
    server, site = rounds(values, tmp_path, "scaffold", local=local, count=1)
    expected = trees.add(site.initial, server.state["control"], -0.05)
    assert reference.far(server.state["adapter"], reference.wide(expected)) < 1e-6


def test_ditto_keeps_personal_adapters(values: dict[str, Any], tmp_path: Path) -> None:
    server, site = rounds(values, tmp_path, "ditto", local={})
    own = kept(site, server)
    assert len({str(bits(state["personal"])) for state in own.values()}) == len(own) == 3


REFUSED = [
    ("scaffold", {}, {}, "algorithm: scaffold corrects plain gradients, and with adamw"),
    ("scaffold", {**SGD, "schedule": "cosine"}, {}, "set local.schedule to constant"),
    ("scaffold", SGD, {"clients": {"per_round": 2}}, r"set pipeline to \[weigh: \{by: uniform\}\]"),
    ("fednova", {}, {}, "algorithm.fednova.heuristic to true"),
    ("ditto", {"moments": "keep"}, {}, "algorithm: ditto trains two adapters at a client"),
    ("krum", {}, {}, "krum with byzantine 1 needs 5 clients a round, and this job has 3"),
    ("fedavgm", {}, {"clients": {"ranks": {"site-1": 1}}}, "fedavgm needs one rank for all clients"),
]


@pytest.mark.parametrize(("algorithm", "local", "more", "sentence"), REFUSED)
def test_jobs_are_refused_before_a_model_is_loaded(
    values: dict[str, Any], algorithm: str, local: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    job = Job(**{**values, **more, "algorithm": algorithm, "local": {**values["local"], **local}})
    with pytest.raises(JobError, match=sentence):
        prepare(job)


def test_scaffold_takes_a_part_of_the_clients_where_each_counts_once(values: dict[str, Any]) -> None:
    values |= {"clients": {"per_round": 2}, "pipeline": [{"weigh": {"by": "uniform"}}]}
    assert prepare(Job(**{**values, "algorithm": "scaffold", "local": SGD})).facts().uniform
