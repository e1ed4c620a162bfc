"""Runs with encodings, memories and noise: killed and resumed to the same bytes; damaged messages; the way down."""

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.test_runs import adapter_hash
from weft import Job, journal
from weft.algorithms.fedavg import fedavg
from weft.core import coding, pipeline, trees
from weft.core.errors import JobError, PolicyError, RunError
from weft.core.round import run_round
from weft.core.types import Order, Parcel, Reply, Server, State
from weft.links.local import Local
from weft.site.secret import secret_of
from weft.testing import toys
from weft.testing.faults import Died, dying_at
from weft.testing.sound import bits
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.quantize import quantize
from weft.transforms.topk import topk
from weft.transforms.weigh import weigh

REMEMBERING = ["delta", {"topk": 0.2}, {"quantize": {"bits": 4, "rounding": "stochastic"}}, "zstd", "weigh"]
NOISY = ["delta", {"clip": 0.05}, {"weigh": "uniform"}, {"noise": 0.1}, {"quantize": 8}]


@pytest.fixture
def two(values: dict[str, Any]) -> dict[str, Any]:
    """Return a job of two rounds, two of three clients in each."""
    return values | {
        "clients": {"per_round": 2},
        "baselines": [],
        "rounds": 2,
        "evaluate": {"every": 0, "on": ["loss"]},
    }


def test_error_feedback_and_stochastic_rounding_survive_death(two: dict[str, Any], tmp_path: Path) -> None:
    two |= {"pipeline": REMEMBERING, "downlink": [{"quantize": {"bits": 8, "rounding": "stochastic"}}]}
    with dying_at(0) as points:
        expected = adapter_hash(weft.run(Job(**two), tmp_path / "whole"))
    for number in range(8, len(points) + 1, 19):
        folder = tmp_path / f"at-{number}"
        with pytest.raises(Died), dying_at(number):
            weft.run(Job(**two), folder)
        run = weft.run(Job(**two), folder, resume=(folder / "run.json").is_file())
        assert adapter_hash(run) == expected, points[number - 1]


def test_a_residual_that_is_lost_would_show(
    two: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: where clients find nothing that they kept, the same job ends in other bytes."""
    two |= {"pipeline": REMEMBERING, "rounds": 3}
    expected = adapter_hash(weft.run(Job(**two), tmp_path / "kept"))
    load = weft.site.memory.Memory.load  # type: ignore[attr-defined]

    def empty(memory: Any, client: str, number: int) -> State:
        return {part: trees.zeros(tree) for part, tree in load(memory, client, number).items()}

    monkeypatch.setattr("weft.site.memory.Memory.load", empty)
    assert adapter_hash(weft.run(Job(**two), tmp_path / "lost")) != expected


def test_noise_is_private_and_the_same_after_a_stop(two: dict[str, Any], tmp_path: Path) -> None:
    """Two folders, one job, one seed: other noise. One folder, stopped and resumed: the same bytes."""
    two |= {"pipeline": NOISY}
    one = weft.run(Job(**two), tmp_path / "one")
    other = weft.run(Job(**two), tmp_path / "other")
    assert adapter_hash(one) != adapter_hash(other)
    path = one.folder / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    third = tmp_path / "third"
    with pytest.raises(Died), dying_at(60):
        weft.run(Job(**two), third)
    assert journal.read(third / "journal.jsonl")[-1]["round"] < 2
    (third / "secret").write_bytes(path.read_bytes())  # as if this run had drawn the same one
    later = [row for row in (third / "checkpoints").glob("*") if int(row.stem)]
    for row in later:  # rounds that had other noise
        row.unlink()
    assert adapter_hash(weft.run(Job(**two), third, resume=True)) == adapter_hash(one)


def test_the_secret_is_in_no_file_but_its_own(two: dict[str, Any], tmp_path: Path) -> None:
    run = weft.run(Job(**two | {"pipeline": NOISY}), tmp_path / "run")
    content = (run.folder / "secret").read_bytes()
    for path in run.folder.rglob("*"):
        if path.is_file() and path.name != "secret":
            assert content not in path.read_bytes(), path
            assert content.hex().encode() not in path.read_bytes(), path
    assert not (weft.run(Job(**two), tmp_path / "plain").folder / "secret").exists()


def test_a_damaged_secret_is_named(tmp_path: Path) -> None:
    drawn = secret_of(tmp_path)
    assert secret_of(tmp_path) == drawn
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(PolicyError, match="secret is damaged"):
        secret_of(tmp_path)


def test_baselines_have_no_pipeline(two: dict[str, Any], tmp_path: Path) -> None:
    """Centralized training is that of all records in one place: nothing is clipped, coded or noised."""
    two |= {"baselines": ["centralized"], "rounds": 1}
    plain = weft.run(Job(**two), tmp_path / "plain")
    coded = weft.run(Job(**two | {"pipeline": NOISY, "downlink": [{"quantize": 4}]}), tmp_path / "coded")
    assert plain.results["methods"]["centralized"] == coded.results["methods"]["centralized"]
    assert plain.results["methods"]["federated"] != coded.results["methods"]["federated"]


# --- the way down

STEPS: pipeline.Pipeline = [("delta", delta()), ("topk", topk(0.3)), ("weigh", weigh())]
DOWNLINK: pipeline.Pipeline = [("quantize", quantize(8))]


def test_clients_count_from_what_they_received_and_the_server_from_what_it_has() -> None:
    """Clipped to nothing, the next adapter is the server's own, not the rounded one; norms are measured from that."""
    steps: pipeline.Pipeline = [("delta", delta()), ("clip", clip(1e-12)), ("weigh", weigh())]
    toy, algorithm = toys.toy(), fedavg()
    before = algorithm.init(toys.adapter())
    link = Local([toys.ToySite(toy, algorithm, steps, downlink=DOWNLINK)])
    server, record = run_round(Server(before), toy.federation(algorithm, steps, DOWNLINK), link)
    for name, value in trees.flatten(server.state).items():
        assert torch.allclose(value, trees.flatten(before)[name], rtol=0, atol=1e-9), name
    at = coding.at_down(7, 1)
    received = coding.decode(DOWNLINK, at, pipeline.down(DOWNLINK, at, Parcel(before, 1)).update, before)
    assert trees.norm(trees.subtract(received["adapter"], before["adapter"])) > 1e-3  # rounding would show
    assert max(row["update_norm"] for row in record["clients"].values()) < 1e-6


def test_steps_smaller_than_the_rounding_add_up() -> None:
    """Each round moves by 0.001, a tenth of a step of four bits: after 40 rounds 0.04, none of it lost.

    Negative control: without delta the mean of what clients have is all the server gets, and nothing ever moves.
    """

    def client(work: Any, received: State, kept: State) -> tuple[State, State]:
        return {"adapter": {name: value + 0.001 for name, value in received["adapter"].items()}}, kept

    down: pipeline.Pipeline = [("quantize", quantize(4))]
    moved = []
    for steps in ([("delta", delta()), ("weigh", weigh())], [("weigh", weigh())]):
        played = toys.play(lambda: replace(fedavg(), client=client), steps, 40, toy=toys.toy(), downlink=down)
        bias = [server.state["adapter"]["n.weight"] for server in played.servers]
        moved.append(float((bias[-1] - bias[0]).mean()))
    assert moved[0] == pytest.approx(0.04, rel=1e-3)
    assert abs(moved[1] - 0.04) > 0.01


def test_ranks_that_grow_and_ranks_that_are_cut_travel_coded() -> None:
    """An adapter of flora grows from round to round, hetlora's clients send no more ranks than they have."""
    from weft.algorithms.flora import flora
    from weft.algorithms.hetlora import hetlora

    steps: pipeline.Pipeline = [("quantize", quantize(16)), ("weigh", weigh())]
    few = {name: replace(client, rank=1) if name in "ab" else client for name, client in toys.toy().clients.items()}
    toy = replace(toys.toy(5), clients=few)
    for make in (flora, hetlora):
        plain, coded = (
            toys.play(make, given, toy=toy, downlink=down).used["a"]
            for given, down in (([("weigh", weigh())], ()), (steps, [("quantize", quantize(16))]))
        )
        for name, value in toys.effective(plain).items():
            assert torch.allclose(value, toys.effective(coded)[name], atol=0.1), (make, name)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("delta", "it works on the sum of replies"),
        ("weigh", "it works on the sum of replies"),
        ({"noise": 1.0}, "it works on the sum of replies"),
        ({"clip": 1.0}, "the server sends the adapter itself"),
        ({"topk": {"feedback": False}}, "the server sends the adapter itself"),
        ({"topk": 0.1}, "a client may miss rounds"),
        ({"quantize": {"feedback": True}}, "a client may miss rounds"),
    ],
)
def test_what_makes_no_sense_on_the_way_down(step: Any, words: str, two: dict[str, Any]) -> None:
    from weft.prepare import prepare

    with pytest.raises(JobError, match=f"downlink: .*: .*{words}"):
        prepare(Job(**two | {"downlink": [step]}))


# --- damaged messages

Change = Any


class Tampered(Local):
    """Changes the reply of client b on the way."""

    change: Change = None

    def exchange(self, order: Order) -> Iterator[Reply]:
        for reply in super().exchange(order):
            yield replace(reply, update=type(self).change(reply.update)) if reply.client == "b" else reply


def other(part: str, name: str, value: torch.Tensor) -> Change:
    return lambda update: update | {part: update[part] | {name: value}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda update: {}, "topk/places is missing"),
        (lambda update: update | {"more": {"w": torch.ones(1)}}, "more/w is not expected"),
        (other("topk", "values", torch.ones(3)), r"topk/values is \(3,\) torch.float32, not \(10,\)"),
        (other("topk", "values", torch.ones(10).double()), r"torch.float64, not \(10,\) torch.float32"),
        (
            other("topk", "places", torch.full((5,), 255, dtype=torch.uint8)),
            "places are not those of different numbers",
        ),
        (other("topk", "values", torch.full((10,), torch.nan)), "holds a NaN or an infinity"),
        (other("topk", "values", torch.full((10,), 1e6)), "holds a value that is not below 32768"),
        (
            lambda update: update | {"shapes": {"shapes": torch.ones(7, dtype=torch.int32)}},
            "shapes/shapes is not expected",
        ),
    ],
)
def test_a_damaged_code_is_refused_in_one_sentence_and_enters_nothing(change: Change, words: str) -> None:
    """The round names client b; with it dropped, the sum is that of the others."""
    from weft.core.failures import Policy

    toy, link = toys.toy(per_round=5), type("Link", (Tampered,), {"change": staticmethod(change)})
    federation = toy.federation(fedavg(), STEPS)
    server = Server(fedavg().init(toys.adapter()))
    with pytest.raises(RunError, match=f"round 1: client b: .*{words}") as caught:
        run_round(server, federation, link([toys.ToySite(toy, fedavg(), STEPS)]))
    assert "\n" not in str(caught.value)
    dropping = replace(federation, policy=Policy("drop", on_nan="drop"))
    after, record = run_round(server, dropping, link([toys.ToySite(toy, fedavg(), STEPS)]))
    assert list(record["dropped"]) == ["b"]
    assert not trees.not_finite(after.state)
    clients = {name: client for name, client in toy.clients.items() if name != "b"}
    rest = replace(toy, clients=clients, per_round=4)
    alone, _ = run_round(server, rest.federation(fedavg(), STEPS), Local([toys.ToySite(rest, fedavg(), STEPS)]))
    assert bits(after.state) == bits(alone.state)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (torch.full((7,), 10**9, dtype=torch.int32), "cannot be"),
        (torch.full((7,), -1, dtype=torch.int32), "cannot be"),
        (torch.ones(2, dtype=torch.int32), "its shapes are not those of these tensors"),
        (torch.ones(7), "its shapes are not those of these tensors"),
        (torch.ones(7, dtype=torch.int32), "quantize/codes is"),
    ],
)
def test_shapes_that_cannot_be_are_refused(sizes: torch.Tensor, words: str) -> None:
    """Where a sender may have shapes of its own, none makes the receiver reserve more than a rank can take."""
    at, form = coding.at_down(7, 1), {"adapter": toys.adapter()}
    coded = coding.encode(DOWNLINK, at, Parcel(form, 1), form).update
    with pytest.raises(RunError, match=f"a message is damaged: .*{words}"):
        coding.decode(DOWNLINK, at, coded | {"shapes": {"shapes": sizes}}, form, free=True)


def test_a_client_whose_training_diverges_says_so_before_anything_is_coded(two: dict[str, Any], tmp_path: Path) -> None:
    """A NaN would be lost among the largest numbers, and stay in a residual for ever."""
    two |= {"pipeline": REMEMBERING, "local": {"lr": 1e30, "batch": 2, "clip": None}}
    with pytest.raises(RunError, match=r"the loss is not a number|holds a NaN or an infinity"):
        weft.run(Job(**two), tmp_path / "run")
