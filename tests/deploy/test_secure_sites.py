"""Secure aggregation between sites, over TLS on loopback: the bits of the plain sum, with a site that drops out."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason='flwr is missing; install it with `pip install -e ".[deploy]"`')

import weft
from tests.deploy.world import KEYS, World, adapter, take_turns
from weft import Job, identity
from weft.core.errors import JobError, RunError
from weft.core.round import sample
from weft.core.types import Order, Reply
from weft.deploy.certificates import Certificates
from weft.deploy.join import Member
from weft.deploy.policy import Policy
from weft.journal import read as read_journal
from weft.links.flower.hub import Hub
from weft.links.flower.records import joined, record
from weft.secure.pinned import Pinned
from weft.site.site import Site
from weft.sites import at_coordinator
from weft.store import Store

SECURE: list[Any] = ["delta", {"clip": {"norm": 2.0}}, {"weigh": {"cap": 8}}, "ring", "mask"]
FOUR = KEYS | {"site-3": identity.new()}


@pytest.fixture
def secure(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    take_turns(monkeypatch)
    return values | {"pipeline": SECURE, "rounds": 2, "baselines": [], "evaluate": {"every": 0, "on": ["loss"]}}


def test_masks_change_no_byte(secure: dict[str, Any], tmp_path: Path, tls: Certificates) -> None:
    """A policy that refuses readable updates lets this job in; the plain ring in simulation gives the same adapter."""
    world = World(secure, tmp_path, tls)
    for name in KEYS:
        world.join(name, policy=Policy(patience=10, plaintext_updates="refuse"))
    folder = world.serve(exact=True)
    world.end()
    assert world.errors == {}
    plain = weft.run(Job(**world.values | {"pipeline": SECURE[:-1]}), tmp_path / "plain", exact=True)
    assert adapter(folder) == adapter(plain.folder)
    results = json.loads((folder / "results.json").read_text())
    assert results["secure"] == {"aggregation": "Bonawitz 2017, double masks", "simulated": False}
    assert results["methods"] == plain.results["methods"]
    for row in read_journal(folder / "journal.jsonl")[1:]:
        assert row["secure"]["survivors"] == 3
        assert all(set(client) == {"bytes_up", "bytes_down"} for client in row["clients"].values())
    assert any("only the sum of a round's 3 sites is opened, once 3 have stayed" in said for said in world.notes.said)
    told = json.loads((folder / "split.json").read_text())
    assert told["train"]["records"] is None  # a number of records does not leave a site under a mask
    assert all(set(client) == {"histogram"} for client in told["clients"].values())
    assert "simulated in one process" not in (folder / "report.html").read_text(encoding="utf8")


def test_the_journal_has_every_byte_of_every_letter(
    secure: dict[str, Any], tmp_path: Path, tls: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders, replies, questions and answers, as they are at the coordinator's end; and the simulation has the same."""
    crossed: Counter[tuple[str, str]] = Counter()
    send, collect = Hub.send, Hub.collect

    def sending(hub: Hub, site: str, front: bytes, body: Any) -> int:
        number = send(hub, site, front, body)
        sites[number] = site
        crossed[site, "down"] += len(joined(record(front, body)))
        return number

    def collecting(hub: Hub, numbers: Any) -> Any:
        found = collect(hub, numbers)
        if found:
            crossed[sites[found[0]], "up"] += len(found[1])
        return found

    def journal(store: Store, server: Any, record: Any) -> None:
        rounds.append(dict(crossed))
        commit(store, server, record)

    sites: dict[int, str] = {}
    rounds: list[dict[tuple[str, str], int]] = []
    commit = Store.commit
    monkeypatch.setattr(Hub, "send", sending)
    monkeypatch.setattr(Hub, "collect", collecting)
    monkeypatch.setattr(Store, "commit", journal)
    world = World(secure, tmp_path, tls)
    for name in KEYS:
        world.join(name)
    folder = world.serve()
    world.end()
    first, second = (row["clients"] for row in read_journal(folder / "journal.jsonl")[1:])
    for name in KEYS:
        for way in ("up", "down"):
            between = rounds[-1][name, way] - rounds[-2][name, way]
            assert second[name][f"bytes_{way}"] == between
    simulated = weft.run(world.job, tmp_path / "simulated", report=False)
    rows = read_journal(simulated.folder / "journal.jsonl")[1:]
    assert [row["clients"] for row in rows] == [first, second]


def four(folder: Path) -> None:
    """Divide the records among four sites."""
    for part in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        lines = [json.dumps(row | {"site": f"site-{i % 4}"}) + "\n" for i, row in enumerate(rows)]
        (folder / f"{part}.jsonl").write_text("".join(lines))


def test_a_site_that_drops_out_costs_its_own_update_alone(
    secure: dict[str, Any], tmp_path: Path, tls: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site 1 of 4 loses its keys, as a restart does, twice: with the order of round 1, and once its vector of round 2
    is counted. The plain run loses the same client in round 1 alone.
    """
    secure["failures"] = {"on_client_failure": "drop"}
    four(tmp_path)
    world, answer, moments = World(secure, tmp_path, tls, FOUR), Member.answer, [b'"train","round":1', b'"secure.cons']

    def forgetting(member: Member, content: bytes) -> tuple[bytes, bool]:
        if member.own.name == "site-1" and moments and moments[0] in content[:4000]:
            moments.pop(0)
            assert member._site
            member._site.members["site-1"]._session = None
        return answer(member, content)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "answer", forgetting)
        for name in FOUR:
            world.join(name)
        folder = world.serve(exact=True)
        world.end()
    assert (world.errors, moments) == ({}, [])
    first, second = read_journal(folder / "journal.jsonl")[1:]
    assert first["dropped"] == {"site-1": "site-1 has no keys for this round any more, and drops out"}
    assert second["dropped"] == {}
    assert [(row["secure"]["survivors"], list(row["secure"]["late"])) for row in (first, second)] == [
        (3, []),
        (4, ["site-1"]),
    ]
    handle = Site.handle

    def losing(site: Site, order: Order) -> Any:
        for reply in handle(site, order):
            lost = order.kind == "train" and (reply.client, reply.round) == ("site-1", 1)
            yield Reply("site-1", 1, failure="away") if lost else reply

    monkeypatch.setattr(Site, "handle", losing)
    plain = weft.run(Job(**world.values | {"pipeline": SECURE[:-1]}), tmp_path / "plain", exact=True)
    assert adapter(folder) == adapter(plain.folder)


def test_a_site_that_pins_other_keys_agrees_with_nobody(
    secure: dict[str, Any], tmp_path: Path, tls: Certificates
) -> None:
    """All that it signs is bound to the keys of the job that it accepted, so that none of it counts for the others."""
    world = World(secure, tmp_path, tls)
    honest = Pinned.member

    def other(pinned: Pinned, name: str, *given: Any) -> Any:
        peers = {**pinned.peers, "site-2": identity.new().public} if name == "site-0" else pinned.peers
        return honest(replace(pinned, peers=peers), name, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pinned, "member", other)
        for name in KEYS:
            world.join(name)
        with pytest.raises(RunError, match="2 of 3 clients agree on keys, and secure aggregation needs 3"):
            world.serve(exact=True)
        world.end()


@pytest.mark.parametrize(
    ("clients", "says"),
    [
        ({"per_round": 2}, "a sum of 2 gives a client's update away"),
        ({"sampler": "poisson"}, "clients.sampler.*under a mask clients draw their cohort themselves"),
        ({"sampler": "utility"}, "draws by the records or devices of clients, which only a simulation knows"),
        ({"pace": {"fedbuff": {"buffer": 2}}}, "goes by a virtual clock, which only a simulation has"),
    ],
)
def test_what_cannot_run_between_sites_is_refused_with_its_reason(
    secure: dict[str, Any], clients: dict[str, Any], says: str
) -> None:
    secure["sites"] = {name: {"key": key.public} for name, key in KEYS.items()}
    with pytest.raises(JobError, match=says):
        at_coordinator(Job(**secure | {"clients": clients}))


@pytest.mark.parametrize(
    "sampler", ["uniform", "round_robin", "poisson", {"availability": {"windows": {"*": [2, 0, 1]}}}]
)
def test_samplers_that_only_draw_run_between_sites(secure: dict[str, Any], sampler: Any) -> None:
    secure["sites"] = {name: {"key": key.public} for name, key in KEYS.items()}
    clients = {"per_round": 2, "sampler": sampler}
    federation = at_coordinator(Job(**secure | {"pipeline": ["weigh"], "clients": clients})).federation()
    assert set(sample(federation, 1)) <= set(KEYS)
