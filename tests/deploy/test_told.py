"""What a site has told by its own count: costs, the policy's limit over all jobs, a coordinator that asks for more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason='flwr is missing; install it with `pip install -e ".[deploy]"`')
pytest.importorskip("dp_accounting", reason="dp-accounting is missing")

import torch

from tests.deploy.world import KEYS, World, take_turns
from weft import Job
from weft.core.errors import PolicyError, RunError, WeftError
from weft.core.types import Order
from weft.deploy.certificates import Certificates
from weft.deploy.join import Member
from weft.deploy.own import Own
from weft.deploy.policy import Policy, check
from weft.deploy.summary import Summary, summary
from weft.deploy.told import Cost, Told, epsilon_of
from weft.links import letters
from weft.privacy import Spent, epsilon

DP = {"local": {"lr": 0.01, "batch": 2, "dp": {"clip": 1.0, "noise": 2.0}}}
DELTA = 1e-3
WITHIN = Policy(patience=10, max_epsilon=100.0, delta=DELTA)
UPDATES: list[Any] = ["delta", {"clip": {"norm": 2.0}}, {"weigh": {"by": "uniform"}}]
NOISY = [*UPDATES, {"noise": {"multiplier": 4.0}}]
SHARES = [*UPDATES, "ring", {"discrete_noise": {"multiplier": 4.0, "colluders": 1}}, "mask"]


@pytest.fixture
def world(values: dict[str, Any], tmp_path: Path, tls: Certificates, monkeypatch: pytest.MonkeyPatch) -> World:
    take_turns(monkeypatch)
    return World(values | DP | {"baselines": [], "privacy": {"delta": DELTA}}, tmp_path, tls)


def own_of(world: World, policy: Policy = WITHIN) -> Own:
    """Return site-0, which has five records."""
    paths = [world.folder / f"site-0-{part}.jsonl" for part in ("train", "test")]
    model = str(world.values["model"]["name"])
    return Own("site-0", *paths, model, KEYS["site-0"], world.folder / "at-site-0", policy, world.job.hash())


def shown(world: World, policy: Policy = WITHIN, **changes: Any) -> Summary:
    return summary(Job(**world.values | changes), own_of(world, policy))


# --- what a job costs


def test_a_round_of_private_training_costs_its_steps(world: World) -> None:
    """Five records, two to expect of a batch, an epoch of three steps: three rounds are nine steps at a rate of 2/5."""
    asked = shown(world).asked
    assert asked.cost == Cost("one record", Spent(2.0, 0.4, 3))
    assert asked.epsilon == epsilon((Spent(2.0, 0.4, 9),), DELTA).value
    assert (asked.told, asked.records) == (0.0, 5)


@pytest.mark.parametrize("pipeline", [["weigh"], NOISY])
def test_noise_of_the_coordinator_is_none_of_a_sites(world: World, pipeline: list[Any]) -> None:
    asked = shown(world, pipeline=pipeline, local={"batch": 2}).asked
    assert asked.cost is None
    with pytest.raises(PolicyError, match=r"adds no noise at this site.*max_epsilon: 100; the job needs local\.dp"):
        check(WITHIN, asked)
    check(Policy(), asked)


def test_shares_of_noise_under_a_mask_count(world: World) -> None:
    found = shown(world, pipeline=SHARES, local={"batch": 2})
    assert found.asked.cost == Cost("one client, all of its records", Spent(4.0, 1.0, 1), discrete=True)
    assert found.asked.epsilon == epsilon((Spent(4.0, 1.0, 3),), DELTA, discrete=True).value
    check(WITHIN, found.asked)


def test_the_account_of_records_is_the_one_that_counts_where_there_are_two(world: World) -> None:
    cost = shown(world, pipeline=SHARES).asked.cost
    assert cost == Cost("one record", Spent(2.0, 0.4, 3))


# --- the limit


def test_a_job_that_spends_more_is_refused(world: World, record_property: Callable[[str, object], None]) -> None:
    asked = shown(world).asked
    check(Policy(max_epsilon=asked.epsilon, delta=DELTA), asked)
    with pytest.raises(
        PolicyError, match=r"3 rounds of the job come to epsilon .* for one record and .*: 1.5"
    ) as caught:
        check(Policy(max_epsilon=1.5, delta=DELTA), asked)
    record_property("said", str(caught.value))
    with pytest.raises(PolicyError, match="not below one over its 5 records") as caught:
        check(Policy(max_epsilon=2.0, delta=0.2), asked)
    record_property("said too", str(caught.value))


def test_a_person_is_shown_the_epsilon_and_what_was_told_before(world: World) -> None:
    first = shown(world)
    assert first.rows["privacy"].startswith(f"epsilon {first.asked.epsilon:.4g} at delta 0.001 for one record after")
    other = {"job": "another", "round": 1, "state": "s", "secret": "x", "data": "d"}
    own = own_of(world)
    own.folder.mkdir()
    Told(own.ledger).count(other, Cost("one record", Spent(2.0, 0.4, 3)), None, DELTA)
    second = shown(world)
    assert second.asked.epsilon == epsilon((Spent(2.0, 0.4, 12),), DELTA).value
    assert f"{second.asked.told:.4g} of it from earlier jobs" in second.rows["privacy"]
    with pytest.raises(PolicyError, match="of it told in earlier jobs, and this"):
        check(Policy(max_epsilon=first.asked.epsilon, delta=DELTA), second.asked)


# --- the lines


def test_the_same_round_counts_once_and_another_state_again(tmp_path: Path) -> None:
    cost, row = Cost("one record", Spent(2.0, 0.5, 4)), {"job": "j", "round": 1, "state": "a", "secret": "x"}
    told = Told(tmp_path / "privacy.jsonl")
    for state in ("a", "a", "b"):
        told.count(row | {"state": state}, cost, None, DELTA)
    assert [line["state"] for line in Told(tmp_path / "privacy.jsonl").rows] == ["a", "b"]
    assert epsilon_of(told.rows, DELTA) == epsilon((Spent(2.0, 0.5, 8),), DELTA).value
    with pytest.raises(PolicyError, match="would bring what this site has told of one record to epsilon"):
        told.count(row | {"state": "c"}, cost, epsilon_of(told.rows, DELTA), DELTA)
    assert len(Told(tmp_path / "privacy.jsonl").rows) == 2


def test_each_round_of_shares_counts(tmp_path: Path) -> None:
    told, cost = Told(tmp_path / "privacy.jsonl"), Cost("one client", Spent(4.0, 1.0, 1), discrete=True)
    for _ in range(2):
        told.count({"job": "j", "round": 1, "state": "a", "secret": "x"}, cost, None, DELTA)
    assert epsilon_of(told.rows, DELTA) == epsilon((Spent(4.0, 1.0, 2),), DELTA, discrete=True).value


def test_a_torn_line_never_began_and_a_damaged_one_ends_all(tmp_path: Path) -> None:
    path, cost = tmp_path / "privacy.jsonl", Cost("one record", Spent(2.0, 0.5, 4))
    Told(path).count({"job": "j", "round": 1}, cost, None, DELTA)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"job": "j", "rou')
    Told(path).count({"job": "j", "round": 2}, cost, None, DELTA)
    assert [row["round"] for row in Told(path).rows] == [1, 2]
    path.write_bytes(b"?" + whole)
    with pytest.raises(RunError, match="line 1: the privacy ledger is damaged"):
        Told(path)


# --- whole runs


@pytest.mark.parametrize("changes", [{}, {"pipeline": SHARES, "local": {"batch": 2}}], ids=["records", "shares"])
def test_a_site_counts_what_the_coordinator_counts(world: World, changes: dict[str, Any]) -> None:
    world.values |= changes
    for name in KEYS:
        world.join(name, policy=WITHIN)
    folder = world.serve()
    world.end()
    assert world.errors == {}
    (told,) = json.loads((folder / "results.json").read_text())["privacy"]
    for name in KEYS:
        rows = Told(world.folder / f"at-{name}" / "privacy.jsonl").rows
        assert [row["round"] for row in rows] == [1, 2, 3]
        assert epsilon_of(rows, DELTA) == pytest.approx(told["clients"][name], rel=1e-5)
    assert all(said.count("round 1: training") == 1 for said in world.said.values())


def test_a_second_job_is_refused_where_both_would_tell_too_much(world: World) -> None:
    one = shown(world).asked.epsilon
    for name in KEYS:
        world.join(name, policy=Policy(patience=10, max_epsilon=1.1 * one, delta=DELTA))
    world.serve()
    world.end()
    world.values["seed"] = 4
    for name in KEYS:
        world.join(name, policy=Policy(patience=10, max_epsilon=1.1 * one, delta=DELTA))
    with pytest.raises(PolicyError, match="of it told in earlier jobs"):
        world.serve(overwrite=True)
    world.end()


def test_a_coordinator_that_asks_for_more_than_it_said_gets_nothing(world: World) -> None:
    """Round 1 once, and once more, are one release; from other states each is a new one, until the limit."""
    job, said = world.job, list[str]()
    policy = Policy(max_epsilon=1.001 * shown(world).asked.epsilon, delta=DELTA)
    own = own_of(world, policy)
    own.folder.mkdir()
    member = Member(own, lambda summary: False, said.append)
    member.answer(letters.letter("job", job.hash(), values=job.resolved(), exact=True))
    described, _ = member.answer(letters.letter("question", job.hash(), kind="describe", body={"base": "b"}))
    adapter = letters.opened(described, ("answer",), job.hash())["body"]["adapter"]

    def trained(far: float, cohort: tuple[str, ...] = ("site-0",)) -> bool:
        state = {"adapter": {name: torch.full_like(tensor, far) for name, tensor in adapter.items()}}
        order = Order("train", 1, ("site-0",), state, cohort=cohort)
        fronts, body = letters.order_letters(job.hash(), order, {"site-0": ("site-0",)})
        content, _ = member.answer(fronts["site-0"] + body)
        return bool(letters.opened(content, ("replies", "failure"), job.hash())["is"] == "replies")

    assert [trained(far) for far in (0.0, 0.0, 0.01, 0.02)] == [True] * 4
    assert member.ended is None
    assert not trained(0.02, ("site-0", "site-1"))
    assert isinstance(member.ended, WeftError)
    assert "would bring what this site has told of one record to epsilon" in said[-1]
