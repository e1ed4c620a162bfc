"""Whole rounds: with masks and without the same bytes, for every algorithm that the sum is enough for."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weft import plugins
from weft.algorithms.fedadam import fedadam
from weft.algorithms.fedavg import fedavg
from weft.algorithms.ffa_lora import ffa_lora
from weft.algorithms.rolora import rolora
from weft.algorithms.scaffold import scaffold
from weft.core.errors import PolicyError, RunError
from weft.core.failures import Policy
from weft.core.pipeline import Pipeline
from weft.core.round import run_round
from weft.core.types import Algorithm, Link, Order, Question, Reply, Server
from weft.links.local import Local
from weft.secure.ledger import Ledger
from weft.secure.member import Member
from weft.secure.simulated import Simulated, simulate
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Toy, ToySite

RING: tuple[Any, ...] = ("delta", {"clip": {"norm": 3.0}}, {"weigh": {"cap": 5}}, "ring")
NAMES = ("a", "b", "c", "d", "e")


def steps(*named: Any) -> Pipeline:
    made = []
    for step in named:
        choice = plugins.parse("transform", step)
        made.append((choice.name, plugins.build(choice, "transform")))
    return made


@dataclass(frozen=True)
class Losing:
    """A link that loses the answers of some clients to one kind of question, or their replies (`vector`)."""

    link: Link
    silent: Mapping[str, Collection[str]] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)

    def exchange(self, order: Order) -> Iterator[Reply]:
        for reply in self.link.exchange(order):
            self.replies.append(reply)
            if reply.client not in self.silent.get("vector", ()):
                yield reply

    def ask(self, question: Question) -> Sequence[Any]:
        found = self.link.ask(question)
        kind = question.kind.removeprefix("secure.")
        self.answers.extend(content for answers in found for content in answers.values())
        lost = self.silent.get(kind, ())
        return [{name: content for name, content in answers.items() if name not in lost} for answers in found]


@dataclass
class Played:
    server: Server
    record: dict[str, Any]
    link: Losing


def play(
    make: Callable[[], Algorithm],
    pipeline: Pipeline,
    known: Simulated | None,
    rounds: int = 3,
    folder: Path | None = None,
    members: Mapping[str, Member] | None = None,
    **silent: Collection[str],
) -> Played:
    """Run rounds on the five toy clients, all of them in each; the last round may lose some."""
    toy, algorithm = toys.toy(per_round=5), make()
    policy = Policy(on_client_failure="drop")
    secure = known.coordinator() if known else None
    federation = replace(toy.federation(algorithm, pipeline), policy=policy, secure=secure)
    mine = members or (known.members(folder) if known else {})
    halves = [Toy({name: toy.clients[name] for name in part}, 5) for part in ("abc", "de")]
    sites = [ToySite(half, algorithm, pipeline, members={n: mine[n] for n in half.clients if mine}) for half in halves]
    server, record = Server(algorithm.init(toys.adapter())), {}
    for number in range(1, rounds + 1):
        link = Losing(Local(sites), silent if number == rounds else {})
        server, record = run_round(server, federation, link)
    return Played(server, record, link)


def known() -> Simulated:
    return simulate("job", NAMES, 5, 7)


def parity(make: Callable[[], Algorithm], *more: Any, **silent: Collection[str]) -> Played:
    """Run with and without `mask` and compare the servers bit for bit."""
    lost = {name for names in silent.values() for name in names} if "vector" in silent or "keys" in silent else set()
    lost |= set(silent.get("shares", ()))
    plain = play(make, steps(*RING, *more), None, vector=lost)
    masked = play(make, steps(*RING, *more, "mask"), known(), **silent)
    assert bits(plain.server.state) == bits(masked.server.state)
    assert plain.server.since == masked.server.since
    return masked


@pytest.mark.parametrize("make", [fedavg, fedadam, scaffold, ffa_lora, rolora])
def test_masks_change_no_bit_of_the_result(make: Callable[[], Algorithm]) -> None:
    parity(make)


def test_the_same_part_of_all_numbers_may_travel() -> None:
    """A tenth of the numbers, drawn by the public seed, back in their places after the sum."""
    thin: tuple[Any, ...] = (*RING[:2], {"random_mask": {"fraction": 0.3, "feedback": False}}, *RING[2:])
    plain, masked = play(fedavg, steps(*thin), None), play(fedavg, steps(*thin, "mask"), known())
    assert bits(plain.server.state) == bits(masked.server.state)
    (size,) = {reply.update["ring"]["vector"].numel() for reply in masked.link.replies}
    assert size == 10 + 2  # 0.3 of 35 numbers, the weight, the loss
    before, after = toys.adapter(), masked.server.state["adapter"]
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("phase", ["keys", "shares", "vector"])
def test_a_client_that_is_lost_is_as_if_it_had_not_been_asked(phase: str) -> None:
    """Of five clients four must stay."""
    record = parity(scaffold, **{phase: {"b"}}).record
    reasons = {"keys": "no keys", "shares": "no shares", "vector": "no reply"}
    assert record["dropped"] == {"b": reasons[phase]}
    assert (record["cohort"], sorted(record["clients"])) == (list(NAMES), ["a", "c", "d", "e"])


@pytest.mark.parametrize("phase", ["consistency", "unmask"])
def test_a_client_that_is_lost_after_its_vector_counts(phase: str) -> None:
    plain = play(fedavg, steps(*RING), None)
    masked = play(fedavg, steps(*RING, "mask"), known(), **{phase: {"b"}})
    assert bits(plain.server.state) == bits(masked.server.state)
    assert (masked.record["dropped"], list(masked.record["secure"]["late"])) == ({}, ["b"])


@pytest.mark.parametrize("phase", ["keys", "shares", "vector", "consistency", "unmask"])
def test_too_few_end_the_round_in_one_sentence(phase: str) -> None:
    with pytest.raises(RunError, match=r"^round 3: 3 of 5 clients .*, and secure aggregation needs 4; what they sent"):
        play(fedavg, steps(*RING, "mask"), known(), **{phase: {"b", "d"}})


def test_a_loss_under_the_policy_abort_ends_the_run() -> None:
    people, toy, pipeline = known(), toys.toy(per_round=5), steps(*RING, "mask")
    federation = replace(toy.federation(fedavg(), pipeline), secure=people.coordinator())
    link = Losing(Local([ToySite(toy, fedavg(), pipeline, members=people.members())]), {"keys": "b"})
    with pytest.raises(RunError, match="round 1: client b: no keys"):
        run_round(Server(fedavg().init(toys.adapter())), federation, link)


def test_a_client_that_fails_is_lost_and_no_other() -> None:
    """Client b is asked again after its reply was lost, and masks the same vector as before."""
    people, toy, pipeline = known(), toys.toy(per_round=5), steps(*RING, "mask")
    members = people.members()
    policy = Policy(on_client_failure="retry")
    federation = replace(toy.federation(fedavg(), pipeline), secure=people.coordinator(), policy=policy)

    @dataclass(frozen=True)
    class Once(Losing):
        def exchange(self, order: Order) -> Iterator[Reply]:
            first = len(order.clients) == 5
            return (row for row in super().exchange(order) if not (first and row.client == "b"))

    link = Once(Local([ToySite(toy, fedavg(), pipeline, members=members)]))
    server, record = run_round(Server(fedavg().init(toys.adapter())), federation, link)
    assert (record["dropped"], record["asked_again"]) == ({}, {"b": "no reply"})
    assert bits(server.state) == bits(play(fedavg, steps(*RING), None, rounds=1).server.state)
    first, second = (reply for reply in link.replies if reply.client == "b")
    assert bits(first.update) == bits(second.update)


def test_the_journal_tells_of_no_single_client() -> None:
    played = play(fedavg, steps(*RING, "mask"), known())
    record = played.record
    for client in record["clients"].values():
        assert set(client) == {"bytes_up", "bytes_down"}
        assert len({tuple(row.items()) for row in record["clients"].values()}) == 1
    assert [record[name] for name in ("aggregation_error", "drift", "cosine")] == [None] * 3
    assert (record["weight"], record["train_loss"]) == (1 + 2 + 3 + 1 + 5, 1.0)
    assert record["secure"]["hidden_among"] == 3
    sent = sum(len(content) for content in played.link.answers)
    assert record["secure"]["bytes_up"] == sent
    assert record["bytes_up"] == sent + sum(reply.bytes_up for reply in played.link.replies)


def test_every_reply_is_a_vector_and_nothing_else() -> None:
    for reply in play(fedavg, steps(*RING, "mask"), known()).link.replies:
        assert list(reply.update) == ["ring"]
        assert list(reply.update["ring"]) == ["vector"]
        assert (reply.weight, reply.examples, reply.metrics, reply.measured, reply.failure) == (1, 0, {}, {}, None)
        assert int(reply.update["ring"]["vector"].abs().max()) > 2**25


def test_a_server_that_dies_at_any_write_of_a_ledger_goes_on_in_the_same_bytes(tmp_path: Path) -> None:
    """It dies while client k releases its shares; the round is done again with new keys and the same survivors."""
    expected = play(fedavg, steps(*RING, "mask"), known(), rounds=1).server
    for point in range(1, 6):
        people, folder = known(), tmp_path / str(point)
        written: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            write = Ledger._write

            def deadly(self: Ledger, row: dict[str, Any], write: Any = write, written: list[int] = written) -> None:
                write(self, row)
                written.append(1)
                if len(written) == point:  # noqa: B023
                    raise KeyboardInterrupt

            patch.setattr(Ledger, "_write", deadly)
            with pytest.raises(KeyboardInterrupt):
                play(fedavg, steps(*RING, "mask"), people, rounds=1, folder=folder)
        again = play(fedavg, steps(*RING, "mask"), people, rounds=1, folder=folder)
        assert bits(again.server) == bits(expected)
        with pytest.raises(PolicyError, match=r"this sum was opened for a, b, c, d, e"):
            play(fedavg, steps(*RING, "mask"), people, rounds=1, folder=folder, vector={"e"})


def test_noise_in_the_ring_is_hidden_too() -> None:
    """Uniform weights; with mask and without the same noise, so the same bytes; no loss is told."""
    noisy: tuple[Any, ...] = ("delta", {"clip": {"norm": 3.0}}, {"weigh": {"by": "uniform"}}, "ring")
    noisy += ({"discrete_noise": {"multiplier": 0.5, "colluders": 1}},)
    plain = play(fedavg, steps(*noisy), None)
    masked = play(fedavg, steps(*noisy, "mask"), known())
    assert bits(plain.server.state) == bits(masked.server.state)
    assert masked.record["train_loss"] is None
    assert bits(masked.server.state) != bits(play(fedavg, steps(*noisy[:-1]), None).server.state)


def test_a_mask_that_is_left_on_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a server that takes off another mask does not get away with the sum."""
    monkeypatch.setattr("weft.secure.coordinator.self_mask", lambda seed, agreed: bytes(32))
    with pytest.raises(RunError, match="a mask is left on it"):
        play(fedavg, steps(*RING, "mask"), known())
