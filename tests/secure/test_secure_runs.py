"""Whole runs of a job: the same adapter with and without masks, what leaves a site, resume, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.secure.test_pitfalls import chi_square
from tests.test_runs import adapter_hash
from weft import Job, Run
from weft.core.errors import JobError
from weft.core.types import Order, Question, Reply
from weft.journal import read as read_journal
from weft.links import letters
from weft.links.local import Local
from weft.prepare import prepare
from weft.secure.ledger import Ledger
from weft.secure.messages import Kind

SECURE: list[Any] = ["delta", {"clip": {"norm": 2.0}}, {"weigh": {"cap": 8}}, "ring", "mask"]


@pytest.fixture
def secure(values: dict[str, Any]) -> dict[str, Any]:
    """Return a job of three clients whose updates are hidden, two rounds."""
    return {**values, "pipeline": SECURE, "rounds": 2, "baselines": []}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any], str], Run]:
    """Run a job once for all tests of this file."""
    runs: dict[str, Run] = {}

    def run(values: dict[str, Any], name: str) -> Run:
        if name not in runs:
            runs[name] = weft.run(Job(**values), tmp_path_factory.mktemp(name) / "run")
        return runs[name]

    return run


def test_masks_change_no_byte_of_the_adapter(secure: dict[str, Any], done: Any) -> None:
    masked, plain = done(secure, "masked"), done({**secure, "pipeline": SECURE[:-1]}, "plain")
    assert adapter_hash(masked) == adapter_hash(plain)
    assert masked.results["secure"] == {"aggregation": "Bonawitz 2017, double masks", "simulated": True}
    assert "secure" not in plain.results
    told = [[row["train_loss"] for row in run.history[1:]] for run in (masked, plain)]
    assert told[0] == pytest.approx(told[1], rel=1e-5)  # summed in the ring; taken from the clients themselves


def test_the_report_says_simulated_and_the_journal_names_no_counts(secure: dict[str, Any], done: Any) -> None:
    """The split of the fixture: 5, 5 and 4 records, so the weights sum to 14."""
    folder = done(secure, "masked").folder
    page = (folder / "report.html").read_text(encoding="utf8")
    assert "simulated in one process" in page
    assert "each update hidden among 2" in page
    for row in read_journal(folder / "journal.jsonl")[1:]:
        assert all(set(client) == {"bytes_up", "bytes_down"} for client in row["clients"].values())
        assert (row["weight"], row["secure"]["threshold"]) == (14, 3)
        assert row["train_loss"] > 0


def reply_in(message: bytes) -> Reply:
    """Return the one reply of a letter."""
    (tree,) = letters.opened(message, ("replies",), "")["replies"]
    return letters.reply_of(tree, Order("train", tree["round"], (), {}), (tree["client"],))


def test_every_message_that_leaves_a_site_is_decoded(
    secure: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies hold a uniform vector and zeros; answers are messages of the protocol, of one length for all clients."""
    sent: list[tuple[str, bytes]] = []
    answers: list[bytes] = []

    class Watched(Local):
        def ask(self, question: Question) -> list[Any]:
            found = super().ask(question)
            if question.kind.startswith("secure."):
                answers.extend(content for part in found for content in part.values())
            return found

    def watch(way: str, client: str, message: bytes) -> None:
        if way == "up":
            sent.append((client, message))

    monkeypatch.setattr("weft.prepare.Local", partial(Watched, watch=watch))
    weft.run(Job(**secure), tmp_path / "run")
    replies = [(client, reply_in(message)) for client, message in sent]
    trained = [reply for _, reply in replies if not reply.measured]
    assert len(trained) == 2 * 3
    for reply in trained:
        assert (list(reply.update), list(reply.update["ring"])) == (["ring"], ["vector"])
        assert chi_square(reply.update["ring"]["vector"]) > 1e-6
        assert (reply.weight, reply.examples, reply.metrics, reply.failure) == (1, 0, {}, None)
    assert (
        len({len(message) for (_, message), (_, reply) in zip(sent, replies, strict=True) if not reply.measured}) == 1
    )
    sizes: dict[str, set[int]] = {}
    for content in answers:
        sizes.setdefault(Kind(content[4]).name, set()).add(len(content))
    assert {kind: len(found) for kind, found in sizes.items()} == dict.fromkeys(
        ("ADVERT", "SHARES", "CONSISTENT", "UNMASK"), 1
    )


def test_a_plain_ring_would_be_noticed(secure: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without `mask` the same look at the messages finds counts, metrics and small numbers."""
    sent: list[bytes] = []
    watch = lambda way, client, message: sent.append(message) if way == "up" else None  # noqa: E731
    monkeypatch.setattr("weft.prepare.Local", partial(Local, watch=watch))
    weft.run(Job(**{**secure, "pipeline": SECURE[:-1], "rounds": 1}), tmp_path / "run")
    reply = next(reply for reply in map(reply_in, sent) if not reply.measured)
    assert reply.examples > 0
    assert "loss" in reply.metrics
    assert chi_square(reply.update["ring"]["vector"]) < 1e-6


def test_a_run_that_dies_while_a_sum_is_opened_resumes_in_the_same_bytes(
    secure: dict[str, Any], done: Any, tmp_path: Path
) -> None:
    """It dies as the second client releases its shares, in round 2: new keys, the same survivors, the same adapter."""
    written: list[int] = []
    write = Ledger._write

    def deadly(self: Ledger, row: dict[str, Any]) -> None:
        write(self, row)
        written.append(1)
        if len(written) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "_write", deadly)
        with pytest.raises(KeyboardInterrupt):
            weft.run(Job(**secure), tmp_path / "run")
    run = weft.run(Job(**secure), tmp_path / "run", resume=True)
    assert adapter_hash(run) == adapter_hash(done(secure, "masked"))


NOISE = {"discrete_noise": {"multiplier": 1.0, "colluders": 1}}
UNIFORM: list[Any] = ["delta", {"clip": {"norm": 2.0}}, {"weigh": {"by": "uniform"}}, "ring"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients": {"per_round": 2}}, "mask: a sum of 2 gives a client's update away"),
        ({"algorithm": "median"}, "needs every client's own update"),
        ({"algorithm": "flora"}, "needs every client's own update"),
        ({"clients": {"ranks": {"site-0": 1}}}, "ranks that only some clients train|one rank"),
        ({"pipeline": ["delta", {"topk": {"fraction": 0.1}}, *SECURE[1:]]}, "topk"),
        ({"pipeline": [{"weigh": {"cap": 8}}, "mask"]}, "put ring right before it"),
        ({"pipeline": ["weigh", "ring", "mask"]}, "put delta and clip before it"),
        ({"pipeline": [*SECURE[:2], "weigh", "ring", "mask"]}, r"weigh.cap is 1048576"),
        ({"pipeline": [*SECURE, "mask"]}, "a second mask"),
        ({"pipeline": [*UNIFORM, NOISE]}, "put mask last"),
        ({"pipeline": [*SECURE, "zstd"]}, "zstd makes codes of what ring left"),
        ({"pipeline": [*SECURE[:4], {"noise": {"multiplier": 1.0}}, "mask"]}, "use discrete_noise"),
        ({"pipeline": [*SECURE[:3], {"noise": {"multiplier": 1.0}}, *SECURE[3:]]}, "use discrete_noise"),
        ({"pipeline": ["delta", {"quantize": {"bits": 8}}, *SECURE[1:]]}, "quantize"),
        ({"algorithm": "local"}, "its clients send nothing|sends nothing"),
        ({"pipeline": [*SECURE[:4], NOISE, "mask"]}, r"weigh: \{by: uniform\}"),
        (
            {"pipeline": [*UNIFORM, {"discrete_noise": {"multiplier": 1.0, "colluders": 3}}, "mask"]},
            "too few are left to share the noise",
        ),
    ],
)
def test_what_cannot_be_hidden_is_refused_before_anything_starts(
    secure: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError, match=words):
        prepare(Job(**{**secure, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": "fedadam"},
        {"algorithm": "ffa_lora"},
        {"pipeline": [*UNIFORM, NOISE, "mask"]},
        {"pipeline": ["delta", {"clip": {"norm": 2.0}}, {"random_mask": {"feedback": False}}, *SECURE[2:]]},
    ],
)
def test_what_the_sum_is_enough_for_is_allowed(secure: dict[str, Any], changes: dict[str, Any]) -> None:
    prepare(Job(**{**secure, **changes}))
