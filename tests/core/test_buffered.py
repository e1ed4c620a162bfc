"""Rounds that do not wait: who replies when, what a stale update counts, and that nothing under way is lost."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.algorithms import reference
from tests.algorithms.test_lora_rules_run import Stop, Stopping
from weft import Job, plugins
from weft.clients import paced
from weft.core import buffered, trees
from weft.core.buffered import Group, advance, mixed
from weft.core.errors import JobError, KeyProblem, RunError
from weft.core.failures import Policy
from weft.core.pace import Pace
from weft.core.pipeline import Pipeline
from weft.core.round import combined
from weft.core.sampling import Device, Member
from weft.core.types import Algorithm, Link, Order, Server, State
from weft.journal import read as read_journal
from weft.links.local import Local
from weft.paces.fedasync import fedasync
from weft.paces.fedbuff import fedbuff
from weft.prepare import prepare
from weft.store import Store
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Toy, ToySite
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.ring import ring
from weft.transforms.topk import topk
from weft.transforms.weigh import weigh


def made(name: str) -> Algorithm:
    built: Algorithm = plugins.build(plugins.parse("algorithm", {name: {}}), "algorithm")
    return built


def played(
    algorithm: Algorithm,
    pace: Pace | None,
    rounds: int,
    seconds: Mapping[str, float] | None = None,
    *,
    at_work: int = 5,
    jitter: float = 0.0,
    policy: Policy | None = None,
    steps: Pipeline = reference.MEAN,
    link: Callable[[Link], Link] = lambda link: link,
    through: Callable[[Server, Any], Server] = lambda server, row: server,
) -> tuple[list[Server], list[Any]]:
    toy = toys.toy(at_work)
    members = {name: Member(1, 1, Device((seconds or {}).get(name, 0.0), None, jitter)) for name in toy.clients}
    plain = toy.federation(algorithm, steps)
    federation = replace(plain, pace=pace, members=members, policy=policy or Policy())
    site = link(Local([ToySite(toy, algorithm, steps)]))
    servers, rows = [Server(algorithm.init(toys.adapter()))], []
    for _ in range(rounds):
        server, row = advance(servers[-1], federation, site)
        servers.append(through(server, row))
        rows.append(row)
    return servers, rows


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedprox", "ditto", "ffa_lora", "fedsa_lora"])
def test_a_buffer_of_all_without_delays_is_the_synchronous_round(name: str) -> None:
    """Bit for bit: everyone is fresh, and the buffer's mean is the exact one."""
    ours, rows = played(made(name), fedbuff(5), 4)
    theirs, _ = played(made(name), None, 4)
    assert [bits(server.state) for server in ours] == [bits(server.state) for server in theirs]
    assert all(row["staleness"] == 0 for row in rows)


DELTA: Pipeline = [("delta", delta()), ("weigh", weigh())]
CODED: Pipeline = [("delta", delta()), ("topk", topk(0.5)), ("weigh", weigh())]
CLIPPED: Pipeline = [("delta", delta()), ("clip", clip(0.05)), ("weigh", weigh(by="uniform"))]
RING: Pipeline = [*CLIPPED, ("ring", ring())]


@pytest.mark.parametrize("steps", [DELTA, CODED, CLIPPED, RING])
def test_a_full_buffer_of_encoded_updates_is_the_synchronous_round(steps: Pipeline) -> None:
    ours, rows = played(made("fedavg"), fedbuff(5), 3, steps=steps)
    theirs, _ = played(made("fedavg"), None, 3, steps=steps)
    assert [bits(server.state) for server in ours] == [bits(server.state) for server in theirs]
    assert all(row["bytes_up"] for row in rows)


@pytest.mark.parametrize("pace", [fedbuff(2), fedasync()])
def test_stale_differences_are_to_what_the_client_began_with(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same adapters with delta and without, but for float32; not with another start, the planted bug."""
    plain, rows = played(made("fedavg"), pace, 8, SECONDS)
    assert max(client["staleness"] for row in rows for client in row["clients"].values()) > 1

    def apart() -> float:
        other, _ = played(made("fedavg"), pace, 8, SECONDS, steps=DELTA)
        return trees.norm(trees.subtract(plain[-1].state["adapter"], other[-1].state["adapter"]))

    assert apart() < 1e-5
    wrong = lambda federation, state, got, tally: combined(federation, state, got, replace(tally, sent={}))  # noqa: E731
    monkeypatch.setattr(buffered, "combined", wrong)
    assert apart() > 0.1


@pytest.mark.parametrize("steps", [CLIPPED, RING])
def test_clipped_stale_updates_move_the_adapter_no_further_than_a_site_allows(steps: Pipeline) -> None:
    """With the factors 1 / sqrt(1 + staleness) and lr 3, three lengths of clip a step: 0.15."""
    servers, _ = played(made("fedavg"), fedbuff(2, lr=3.0), 8, SECONDS, steps=steps)
    gone = [
        trees.norm(trees.subtract(after.state["adapter"], before.state["adapter"]))
        for before, after in pairwise(servers)
    ]
    assert 0.05 < max(gone) <= 0.15 * 1.00001
    assert paced(made("fedavg"), fedbuff(2, lr=3.0)).reach == 3.0
    assert paced(made("fedavg"), fedasync()).reach == 1.0
    assert paced(made("fedadam"), fedbuff(2, lr=3.0)).reach is None


SECONDS = {"a": 1.0, "b": 2.0, "c": 4.5, "d": 8.0, "e": 8.0}


def test_who_replies_when_by_hand() -> None:
    """Three at work of three, one reply a step, times 1, 2 and 4.5. a: due at 1; it begins again at 1, due at 2, but b,
    which began earlier, is due at 2 as well and goes first. Then a at 2 and at 3, then a and b at 4 (b began at 2, a at
    3), c at 4.5, which began at state 0, six steps ago.
    """
    toy = Toy({name: toys.client(name) for name in "abc"}, 3)
    members = {name: Member(1, 1, Device(SECONDS[name])) for name in toy.clients}
    federation = replace(toy.federation(made("fedavg"), reference.MEAN), pace=fedasync(), members=members)
    link, server = Local([ToySite(toy, made("fedavg"), reference.MEAN)]), Server({"adapter": toys.adapter()})
    seen = []
    for _ in range(7):
        server, row = advance(server, federation, link)
        (name,) = row["cohort"]
        seen.append((name, row["virtual_seconds"], row["clients"][name]["staleness"]))
    assert seen == [("a", 1, 0), ("b", 2, 1), ("a", 2, 1), ("a", 3, 0), ("b", 4, 2), ("a", 4, 1), ("c", 4.5, 6)]


def number(value: float) -> State:
    return {"adapter": {"w": torch.tensor([value])}}


def result(pace: Pace, groups: list[Group], now: float = 10.0, version: int = 3) -> float:
    return float(mixed(number(now), groups, version, pace)["adapter"]["w"])


def test_fedbuff_by_hand() -> None:
    """At 10, a fresh client of weight 1 ends at 12, one of weight 3 went from 4 to 8 three steps ago:
    10 + 1/4 * 2 + 3/4 * 4 / sqrt(1 + 3) = 12.
    """
    groups = [Group(3, number(10.0), number(12.0), 1), Group(0, number(4.0), number(8.0), 3)]
    assert result(fedbuff(2), groups) == 12.0
    assert result(fedbuff(2, staleness="constant"), groups) == 13.5
    assert result(fedbuff(2, lr=0.5), groups) == 11.0


def test_fedasync_by_hand() -> None:
    """0.4 * 10 + 0.6 * 20 = 16; two of staleness 3: a = 0.6 / 2, 0.7 * 10 + 0.3 * 20 = 13."""
    assert result(fedasync(), [Group(3, number(10.0), number(20.0), 5)]) == pytest.approx(16.0)
    assert result(fedasync(), [Group(0, number(4.0), number(20.0), 5)]) == pytest.approx(13.0)
    assert result(fedasync(mix=1.0), [Group(3, number(10.0), number(20.0), 5)]) == 20.0


def test_staleness_by_hand() -> None:
    """Hinge: 1 up to 4, then 1/11, 1/21."""
    assert [fedbuff(staleness="hinge").factor(d) for d in (0, 4, 5, 6)] == [1, 1, 1 / 11, 1 / 21]
    assert [fedbuff(staleness="constant").factor(d) for d in (0, 9)] == [1, 1]
    assert [fedbuff(exponent=1.0).factor(d) for d in (0, 1, 3)] == [1, 0.5, 0.25]


def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference to the server's state of now: 10 + 1/4 * 2 - 3/4 * 2 / 2 = 9.75; and no discount at all."""
    groups = [Group(3, number(10.0), number(12.0), 1), Group(0, number(4.0), number(8.0), 3)]
    assert result(replace(fedbuff(2), from_start=False), groups) == 9.75
    monkeypatch.setattr(buffered, "mixed", lambda now, groups, version, pace: groups[0].update)
    with pytest.raises(AssertionError):
        test_a_stale_update_is_discounted_in_the_round()


def test_a_stale_update_is_discounted_in_the_round() -> None:
    """Against a replay in float64 that knows nothing of orders: each step from the states that the journal names."""
    servers, rows = played(made("fedavg"), fedbuff(2), 6, SECONDS, at_work=4)
    toy = toys.toy()
    assert max(client["staleness"] for row in rows for client in row["clients"].values()) > 1
    for before, row, after in zip(servers, rows, servers[1:], strict=False):
        w = reference.wide(before.state["adapter"])
        total = sum(client["weight"] for client in row["clients"].values())
        for name, told in row["clients"].items():
            start = reference.wide(servers[before.round - told["staleness"]].state["adapter"])
            ended = reference.trained(toy.clients[name], start, toy.lr)
            share = told["weight"] / total * (1 + told["staleness"]) ** -0.5
            w = {n: v + share * (ended[n] - start[n]) for n, v in w.items()}
        assert reference.far(after.state["adapter"], w) < 1e-5


def test_nobody_is_twice_in_a_buffer_and_so_many_are_at_work() -> None:
    _, rows = played(made("fedavg"), fedbuff(3), 12, {"a": 0.01, "b": 5.0}, at_work=4, jitter=0.5)
    for row in rows:
        assert len(set(row["cohort"])) == 3
        assert row["at_work"] <= 4
    times = [row["virtual_seconds"] for row in rows]
    assert times == sorted(times)


def test_the_order_of_replies_and_blocks_changes_no_bit() -> None:
    plain, _ = played(made("fedavg"), fedbuff(3), 6, SECONDS, at_work=4)
    shuffled, _ = played(made("fedavg"), fedbuff(3), 6, SECONDS, at_work=4, link=lambda link: toys.Shuffled(link, 3))
    assert bits(plain[-1].state) == bits(shuffled[-1].state)


@pytest.mark.parametrize("pace", [fedbuff(2), fedasync()])
def test_a_server_that_goes_through_a_checkpoint_after_every_round(pace: Pace, tmp_path: Path) -> None:
    """With all that is under way: who, since when, until when, and the states that they began with."""
    store = Store(tmp_path, "job")

    def stored(server: Server, row: Any) -> Server:
        store.commit(server, row)
        found, notices = store.latest()
        assert found is not None
        assert not notices
        assert bits(found.beside) == bits(server.beside)
        return found

    plain, rows = played(made("ditto"), pace, 8, SECONDS, at_work=4, jitter=0.3)
    again, told = played(made("ditto"), pace, 8, SECONDS, at_work=4, jitter=0.3, through=stored)
    assert bits([server.state for server in plain]) == bits([server.state for server in again])
    assert rows == told
    assert any(part.startswith("state-") for part in again[-1].beside)


def test_control_a_server_that_forgets_what_is_under_way_ends_elsewhere() -> None:
    plain, _ = played(made("fedavg"), fedbuff(2), 8, SECONDS, at_work=4)
    forgets, _ = played(
        made("fedavg"), fedbuff(2), 8, SECONDS, at_work=4, through=lambda server, row: replace(server, beside={})
    )
    assert bits(plain[-1].state) != bits(forgets[-1].state)


def test_states_that_nobody_works_on_are_forgotten() -> None:
    servers, _ = played(made("fedavg"), fedbuff(2), 12, at_work=3)
    for server in servers[1:]:
        held = {part.split("-")[1] for part in server.beside if part.startswith("state-")}
        assert held == {str(version) for version in server.beside["flights"]["version"].tolist()}


def test_a_client_that_fails_is_dropped_or_ends_the_run() -> None:
    class Failing(Local):
        def exchange(self, order: Order) -> Any:
            for reply in super().exchange(order):
                yield replace(reply, failure="the disk is full", update={}) if reply.client == "a" else reply

    link = lambda local: Failing(local.sites)  # noqa: E731
    _, rows = played(made("fedavg"), fedbuff(3), 4, SECONDS, policy=Policy("drop"), link=link)
    assert any(row["dropped"] == {"a": "the disk is full"} for row in rows)
    assert all("a" not in row["clients"] for row in rows)
    with pytest.raises(RunError, match="client a: the disk is full"):
        played(made("fedavg"), fedbuff(3), 4, SECONDS, link=link)


# --- as a job


def job(values: dict[str, Any], pace: Any, **more: Any) -> Job:
    devices = {
        "site-0": {"seconds_per_step": 0.5},
        "default": {"seconds_per_step": 2.0, "bandwidth": 1e5, "jitter": 0.2},
    }
    return Job(**{**values, "clients": {"pace": pace, "devices": devices, "per_round": 2}, **more})


@pytest.mark.parametrize("pace", [{"fedbuff": {"buffer": 2}}, "fedasync"])
def test_a_stopped_run_ends_with_the_same_bytes(pace: Any, values: dict[str, Any], tmp_path: Path) -> None:
    how = job({**values, "rounds": 4, "local": {"lr": 0.01, "batch": 2, "moments": "keep"}}, pace)
    whole = weft.run(how, tmp_path / "whole")
    with pytest.raises(Stop):
        weft.run(how, tmp_path / "stopped", watch=Stopping())
    again = weft.run(how, tmp_path / "stopped", resume=True)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes()
    rows = [read_journal(run.folder / "journal.jsonl")[1:] for run in (whole, again)]
    told = [[(row["virtual_seconds"], row["cohort"], row["staleness"]) for row in run] for run in rows]
    assert told[0] == told[1]
    assert told[0][-1][0] > 0
    assert "Virtual time" in (whole.folder / "report.html").read_text(encoding="utf8")


NOISE = ["delta", {"clip": {"norm": 1.0}}, {"weigh": {"by": "uniform"}}, {"noise": {"multiplier": 1.0}}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pipeline": [*NOISE[:3], "ring", "mask"]}, "secure aggregation is over a round's whole cohort"),
        ({"pipeline": NOISE}, "the privacy account is over a round's whole cohort"),
        (
            {"local": {"optimizer": "sgd", "lr": 0.1, "batch": 2, "dp": {"clip": 1.0, "noise": 1.0}}},
            "the privacy account is over a round's whole cohort",
        ),
        ({"downlink": [{"quantize": {"bits": 8}}]}, "downlink rounds them: leave one of them out"),
    ],
)
def test_what_is_of_one_round_is_refused(change: dict[str, Any], words: str, values: dict[str, Any]) -> None:
    values |= {"clients": {"pace": {"fedbuff": {"buffer": 2}}}, "privacy": {"delta": 1e-3}, **change}
    with pytest.raises(KeyProblem, match=words) as caught:
        prepare(Job(**values))
    assert caught.value.path[:2] == ("clients", "pace")


@pytest.mark.parametrize(
    ("algorithm", "clients", "words"),
    [
        ("scaffold", {}, "scaffold is not defined for"),
        ("rolora", {}, "rolora is not defined for"),
        ("flora", {}, "flora is not defined for"),
        ("fedex_lora", {}, "fedex_lora is not defined for"),
        ("median", {}, "median is not defined for"),
        ("flasc", {}, "flasc is not defined for"),
        ("local", {}, "local is not defined for"),
        ("fedavg", {"sampler": "poisson"}, "not a cohort as poisson does"),
        ("fedavg", {"pace": {"fedbuff": {"buffer": 4}}}, "waits for 4 clients, and this split has 3: lower buffer"),
        ("fedavg", {"pace": "fedbuf"}, "there is no pace `fedbuf`; did you mean `fedbuff`"),
    ],
)
def test_what_is_not_defined_is_refused(algorithm: str, clients: Any, words: str, values: dict[str, Any]) -> None:
    given = {"pace": {"fedbuff": {"buffer": 2}}, **clients}
    values |= {"local": {"optimizer": "sgd", "lr": 0.1}, "algorithm": algorithm, "clients": given}
    with pytest.raises(JobError) as caught:
        prepare(Job(**values))
    assert words in str(caught.value)
    assert str(caught.value).startswith("clients.pace: ")
