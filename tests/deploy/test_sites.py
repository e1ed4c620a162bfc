"""Whole runs between sites, over TLS on loopback: the same bytes as the simulation, refusals, resume."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason='flwr is missing; install it with `pip install -e ".[deploy]"`')

import weft
from tests.deploy.world import KEYS, World, adapter, take_turns
from weft import Run
from weft.core import trees
from weft.core.errors import JobError, PolicyError, RunError
from weft.deploy.certificates import Certificates
from weft.deploy.policy import Policy
from weft.deploy.serve import address_of
from weft.journal import read as read_journal
from weft.site.secret import Secret


@pytest.fixture
def world(values: dict[str, Any], tmp_path: Path, tls: Certificates, monkeypatch: pytest.MonkeyPatch) -> World:
    take_turns(monkeypatch)
    return World(values, tmp_path, tls)


def sent(row: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the bytes up and down of each client in a round."""
    return {name: (told["bytes_up"], told["bytes_down"]) for name, told in row.get("clients", {}).items()}


def test_sites_end_in_the_bytes_of_the_simulation(world: World) -> None:
    for name in KEYS:
        world.join(name)
    folder = world.serve(exact=True)
    world.end()
    simulated = weft.run(world.job, world.folder / "simulated", exact=True)
    assert world.errors == {}
    assert adapter(folder) == adapter(simulated.folder)
    assert {adapter(world.folder / f"at-{name}") for name in KEYS} == {adapter(folder)}
    pairs = zip(read_journal(folder / "journal.jsonl"), read_journal(simulated.folder / "journal.jsonl"), strict=True)
    for real, imagined in pairs:
        assert real.get("evaluation") == imagined.get("evaluation")
        assert real["round"] == 0 or real["aggregation_error"] == imagined["aggregation_error"]
        assert sent(real) == sent(imagined)  # what a simulation counts is what travels, to the byte
    results = json.loads((folder / "results.json").read_text())
    assert results["methods"] == simulated.results["methods"]
    assert (folder / "report.html").stat().st_size > 10_000
    secrets = [word for line in (world.folder / "train.jsonl").read_text().splitlines() for word in [line[:30]]]
    heard = " ".join([*world.notes.said, *(text for said in world.said.values() for text in said)])
    assert not any(word in heard for word in secrets)


def test_without_exact_the_difference_is_rounding_at_most(world: World) -> None:
    """A simulation trains the three clients in one block, a site its one alone: sums in another order, perhaps.

    Seen on x86_64: no difference at all. The bound, a ten thousandth of how far training went, is for other machines.
    """
    for name in KEYS:
        world.join(name)
    real = Run(world.serve()).adapter()
    world.end()
    imagined = weft.run(world.job, world.folder / "simulated").adapter()
    first = weft.run(world.job.model_copy(update={"rounds": 1}), world.folder / "first").adapter()
    went = trees.norm(trees.subtract(imagined, first))
    assert went > 0
    assert trees.norm(trees.subtract(real, imagined)) <= 1e-4 * went


ENCODED = {
    "pipeline": ["delta", {"topk": 0.3}, {"quantize": {"bits": 4, "rounding": "stochastic"}}, "zstd", "weigh"],
    "downlink": [{"quantize": {"bits": 8}}, "zstd"],
}
ADAPTIVE = {
    "pipeline": [
        "delta",
        {"clip": {"norm": 0.5, "quantile": 0.5, "spread": 1.5}},
        {"weigh": {"by": "uniform"}},
        {"noise": {"multiplier": 2.0}},
    ]
}


@pytest.mark.parametrize(
    "changes", [ENCODED, ADAPTIVE], ids=["encoded, with memories, both ways", "a clip that adapts"]
)
def test_every_step_of_the_pipeline_is_the_simulations(
    world: World, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret of the noise is set, since two runs have two; all else is as it comes."""
    monkeypatch.setattr("weft.runs.secret_of", lambda folder: Secret(bytes(32)))
    world.values |= changes | {"baselines": [], "evaluate": {"every": 0, "on": ["loss"]}}
    for name in KEYS:
        world.join(name)
    folder = world.serve(exact=True)
    world.end()
    simulated = weft.run(world.job, world.folder / "simulated", exact=True, report=False)
    assert world.errors == {}
    assert adapter(folder) == adapter(simulated.folder)
    pairs = zip(read_journal(folder / "journal.jsonl"), read_journal(simulated.folder / "journal.jsonl"), strict=True)
    for real, imagined in pairs:
        assert sent(real) == sent(imagined)
        assert real.get("clip_norm") == imagined.get("clip_norm")
    assert ("clip_norm" in real) == (changes is ADAPTIVE)


def test_a_run_that_stopped_goes_on_with_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator fails between the sending of round 2 and its commit; sites stay where they are."""
    from weft.store import Store

    commit = Store.commit

    def failing(store: Store, server: Any, record: Any) -> None:
        if server.round == 2 and not failed:
            failed.append(True)
            raise KeyboardInterrupt
        commit(store, server, record)

    failed: list[bool] = []
    monkeypatch.setattr(Store, "commit", failing)
    for name in KEYS:
        world.join(name, policy=Policy(patience=240))  # a busy machine takes its time to start again
    with pytest.raises(KeyboardInterrupt):
        world.serve(exact=True)
    folder = world.serve(resume=True)
    world.end()
    assert world.errors == {}
    assert [row["round"] for row in read_journal(folder / "journal.jsonl")] == [0, 1, 2, 3]
    assert adapter(folder) == adapter(weft.run(world.job, world.folder / "simulated", exact=True).folder)


def test_a_job_that_a_site_does_not_allow_ends_with_its_reason(world: World) -> None:
    world.join("site-0", policy=Policy(patience=10, max_rounds=2))
    world.join("site-1")
    world.join("site-2")
    with pytest.raises(PolicyError, match="site-0: the job asks for rounds: 3, and this site's policy allows"):
        world.serve()
    world.end()
    assert isinstance(world.errors["site-0"], PolicyError)
    assert isinstance(world.errors["site-1"], RunError)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"accept": "0" * 16}, "did not accept the job"),
        ({"accept": "0"}, "did not accept the job"),
        ({"accept": None}, "did not accept the job"),
    ],
)
def test_a_site_that_does_not_accept_ends_the_run(world: World, changes: dict[str, Any], says: str) -> None:
    for name in KEYS:
        world.join(name, **(changes if name == "site-1" else {}))
    with pytest.raises(PolicyError, match=f"site-1: .*{says}"):
        world.serve()
    world.end()


def test_a_site_with_wrong_records_says_so_on_both_sides(world: World) -> None:
    (world.folder / "site-2-train.jsonl").write_text('{"question": "Zanzibar?"}\n')
    for name in KEYS:
        world.join(name)
    with pytest.raises(PolicyError, match=r"site-2: .*no record has the columns") as caught:
        world.serve()
    world.end()
    assert "Zanzibar" not in str(caught.value)
    assert isinstance(world.errors["site-2"], JobError)


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ({}, "sites: is missing"),
        ({"../x": {"key": KEYS["site-0"].public}}, "no path"),
        ({"a": {"key": "x"}}, "sites.a.key: the key is not a key of Weft"),
        (
            {"a": {"key": KEYS["site-0"].public}, "b": {"key": KEYS["site-0"].public}},
            "sites.b.key: is the key of a as well",
        ),
    ],
)
def test_a_wrong_list_of_sites_is_refused(world: World, sites: dict[str, Any], says: str) -> None:
    world.values["sites"] = sites
    with pytest.raises(JobError, match=says):
        world.serve()


@pytest.mark.parametrize("text", ["", "9092", "host:", "host:port", "host:70000"])
def test_an_address_needs_a_host_and_a_port(text: str) -> None:
    with pytest.raises(JobError, match="HOST:PORT"):
        address_of(text)
    assert address_of("[::1]:9092") == ("::1", 9092)


def test_a_port_in_use_is_named(world: World) -> None:
    with socket.create_server(("127.0.0.1", world.port)), pytest.raises(JobError, match="cannot be opened"):
        world.serve()
