"""Samplers: their chances against the definition, who is refused, rounds without anybody, resume to the same bytes."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.algorithms import reference
from tests.algorithms.test_lora_rules_run import Stop, Stopping
from weft import Job
from weft.algorithms.fedavg import fedavg
from weft.algorithms.krum import krum
from weft.algorithms.scaffold import scaffold
from weft.core.errors import JobError, KeyProblem
from weft.core.round import run_round, sample
from weft.core.sampling import Device, Member, Pool, Sampler, without_replacement
from weft.core.types import Server
from weft.journal import read as read_journal
from weft.links.local import Local
from weft.prepare import prepare
from weft.samplers.availability import availability
from weft.samplers.poisson import poisson
from weft.samplers.round_robin import round_robin
from weft.samplers.uniform import uniform
from weft.samplers.utility import utility
from weft.samplers.weighted import weighted
from weft.testing import toys
from weft.testing.toys import ToySite

NAMES = ("a", "b", "c", "d", "e")
SIZES = {"a": 1, "b": 2, "c": 3, "d": 2, "e": 2}


def pool(number: int = 1, count: int = 2, names: tuple[str, ...] = NAMES, **more: Any) -> Pool:
    members = {name: Member(SIZES.get(name, 1)) for name in names}
    return Pool(names, count, more.pop("seed", 7), number, more.pop("members", members), **more)


def rates(sampler: Sampler, rounds: int = 4000, count: int = 2) -> dict[str, float]:
    seen = Counter(name for number in range(1, rounds + 1) for name in sampler.draw(pool(number, count)))
    return {name: seen[name] / rounds for name in NAMES}


def test_uniform_is_what_a_job_without_a_sampler_has() -> None:
    crowd = toys.toy(3).federation(fedavg(), reference.MEAN)
    named = replace(crowd, sampler=uniform())
    assert [sample(crowd, n) for n in range(1, 30)] == [sample(named, n) for n in range(1, 30)]


def test_poisson_by_its_definition() -> None:
    """Each with chance 2/5, apart from the others: cohorts have 2 on average with variance 5 * 0.4 * 0.6 = 1.2, and
    0.6^5 = 0.078 of them are empty.
    """
    sizes = [len(poisson().draw(pool(number))) for number in range(1, 4001)]
    mean = sum(sizes) / 4000
    assert mean == pytest.approx(2.0, abs=0.09)
    assert sum((size - mean) ** 2 for size in sizes) / 4000 == pytest.approx(1.2, abs=0.15)
    assert sizes.count(0) / 4000 == pytest.approx(0.078, abs=0.02)
    together = sum({"a", "b"} <= set(poisson().draw(pool(number))) for number in range(1, 4001)) / 4000
    assert together == pytest.approx(0.16, abs=0.03)


def test_weighted_asks_by_size_and_is_unbiased() -> None:
    """K p_k = 2 n_k / 10: 0.2, 0.4, 0.6, 0.4, 0.4, so the mean over cohorts of a number n_k is sum p_k n_k = 2.2."""
    assert rates(weighted()) == {name: pytest.approx(2 * SIZES[name] / 10, abs=0.04) for name in NAMES}
    means = [sum(SIZES[name] for name in weighted().draw(pool(number))) / 2 for number in range(1, 4001)]
    assert sum(means) / 4000 == pytest.approx(2.2, abs=0.03)
    control = [sum(SIZES[name] for name in uniform().draw(pool(number))) / 2 for number in range(1, 4001)]
    assert sum(control) / 4000 == pytest.approx(2.0, abs=0.03)


def test_weighted_refuses_what_would_be_biased() -> None:
    members = {name: Member(size) for name, size in SIZES.items()}
    facts = replace(reference.FACTS, clients=5, per_round=2, uniform=True)
    weighted().check(facts, members)
    with pytest.raises(JobError, match="would count their size once more"):
        weighted().check(replace(facts, uniform=False), members)
    with pytest.raises(JobError, match="weighted would have to ask c more than once a round: it has 3 of 10"):
        weighted().check(replace(facts, per_round=4), members)


def test_round_robin_takes_turns() -> None:
    """Five clients, two a round: ten places are five rounds, in which each is asked twice."""
    cohorts = [round_robin().draw(pool(number)) for number in range(1, 6)]
    assert Counter(name for cohort in cohorts for name in cohort) == dict.fromkeys(NAMES, 2)
    assert cohorts[0] == round_robin().draw(pool(6))
    assert set(cohorts[0]).isdisjoint(cohorts[1])


def test_windows_by_hand() -> None:
    """[4, 1, 2]: there in rounds 2, 3, 6, 7, ...; the others always."""
    sampler = availability({"a": (4, 1, 2)})
    there = ["a" in sampler.draw(pool(number, 5)) for number in range(1, 9)]
    assert there == [False, True, True, False, False, True, True, False]
    assert all("b" in sampler.draw(pool(number, 5)) for number in range(1, 9))


def test_a_trace(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("client,first,last\na,1,2\nb,2,2\na,5,9\n", encoding="utf8")
    plain = availability(trace="trace.csv")
    assert plain.open
    sampler = plain.open(tmp_path)
    assert [sorted(sampler.draw(pool(number, 5))) for number in range(1, 6)] == [["a"], ["a", "b"], [], [], ["a"]]
    members = {name: Member() for name in NAMES}
    sampler.check(reference.FACTS, members)
    with pytest.raises(JobError, match=r"trace.csv names a, which is no client"):
        sampler.check(reference.FACTS, {"z": Member()})


@pytest.mark.parametrize("line", ["a,1", "a,one,2", "client;first;last"])
def test_a_line_that_is_no_trace_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"client,first,last\n{line}\n", encoding="utf8")
    opener = availability(trace="t.csv").open
    assert opener
    with pytest.raises(JobError, match=r"t.csv:2: a line of a trace has the columns"):
        opener(tmp_path)


@pytest.mark.parametrize("keys", [{}, {"windows": {"a": (1, 0, 1)}, "trace": "x.csv"}, {"windows": {"z*": (1, 0, 1)}}])
def test_availability_needs_one_source_that_fits(keys: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="availability"):
        availability(**keys).check(reference.FACTS, {"a": Member()})


def test_draws_in_proportion_to_scores() -> None:
    """One of a (3) and b (1): a in three quarters of the draws; two of three leave out c, the smallest, most often."""
    first = Counter(without_replacement({"a": 3.0, "b": 1.0}, 1, 7, i)[0] for i in range(4000))
    assert first["a"] / 4000 == pytest.approx(0.75, abs=0.03)


# --- utility


def memory(loss: dict[str, float], last: dict[str, int]) -> dict[str, torch.Tensor]:
    return {
        "loss": torch.tensor([loss.get(name, 0.0) for name in NAMES]),
        "last": torch.tensor([float(last.get(name, 0)) for name in NAMES]),
    }


def asked(
    sampler: Sampler, known: dict[str, torch.Tensor], rounds: int = 500, count: int = 1, **more: Any
) -> Counter[str]:
    pools = [pool(50, count, memory=known, seed=seed, **more) for seed in range(rounds)]
    return Counter(name for one in pools for name in sampler.draw(one))


def test_large_losses_are_asked_and_nobody_new_is_forgotten() -> None:
    """With all known and as stale as each other, only scores within 0.95 of the best are drawn."""
    everyone = dict.fromkeys(NAMES, 49)
    equal = {name: Member() for name in NAMES}
    seen = asked(
        utility(explore=0.0), memory({"a": 9.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}, everyone), members=equal
    )
    assert seen["a"] == 500
    new = asked(utility(), memory({"a": 9.0, "b": 1.0}, {"a": 49, "b": 49}), count=5, members=equal)
    assert all(new[name] == 500 for name in NAMES)


def test_size_counts_with_the_loss() -> None:
    """C has 3 records of loss 1, a has 1 of loss 2: 3 beats 2."""
    seen = asked(utility(explore=0.0, clip=1.0), memory({"a": 2.0, "c": 1.0}, {"a": 49, "c": 49}))
    assert seen["c"] == 500


def test_slow_devices_are_put_back_and_fast_ones_not_put_forward() -> None:
    """Times 1, 1, 1, 2, 4 and the median 1: factors 1, 1, 1, 1/4, 1/16; a time of 0.1 has factor 1 as well."""
    seconds = {"a": 0.1, "b": 1.0, "c": 1.0, "d": 2.0, "e": 4.0}
    members = {name: Member(1, 1, Device(value)) for name, value in seconds.items()}
    known = memory(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 49))
    seen = asked(utility(explore=0.0), known, members=members)
    assert seen["d"] == seen["e"] == 0
    assert all(120 < seen[name] < 215 for name in "abc")
    without = asked(utility(explore=0.0, slow=0.0), known, members=members)
    assert min(without[name] for name in NAMES) > 60


def test_a_client_that_waits_is_asked_again() -> None:
    """The last round of e is 1, of the others 49: its bonus sqrt(0.1 log 50 / 1) = 0.63 beats theirs, 0.09."""
    known = memory(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 49) | {"e": 1})
    equal = {name: Member() for name in NAMES}
    assert asked(utility(explore=0.0), known, members=equal)["e"] == 500


def test_new_clients_are_tried_by_speed() -> None:
    members = {name: Member(1, 1, Device(9.0 if name == "a" else 1.0)) for name in NAMES}
    seen = asked(utility(explore=1.0), {}, members=members)
    assert seen["a"] < 40 < 80 < min(seen[name] for name in "bcde")


def test_what_is_learned() -> None:
    after = utility().learn(pool(3, memory=memory({"a": 2.0}, {"a": 1})), {"b": {"loss": 1.5}})
    assert (after["loss"].tolist(), after["last"].tolist()) == ([2.0, 1.5, 0, 0, 0], [1.0, 3.0, 0, 0, 0])


CLIPPED = ["delta", {"clip": {"norm": 1.0}}, {"weigh": {"by": "uniform"}}]
NOISED = {"pipeline": [*CLIPPED, {"noise": {"multiplier": 1.0}}]}
MASKED = {"pipeline": [*CLIPPED, "ring", "mask"]}
PRIVATE = {"local": {"optimizer": "sgd", "lr": 0.1, "batch": 2, "dp": {"clip": 1.0, "noise": 1.0}}}


@pytest.mark.parametrize(
    ("sampler", "change", "words"),
    [
        ("utility", NOISED, "utility draws by what clients told, such as losses, which no privacy account covers"),
        ("utility", PRIVATE, "utility draws by what clients told, such as losses, which no privacy account covers"),
        ("utility", MASKED, "utility leaves the draw to the server, and under a mask clients draw their cohort"),
        ("poisson", MASKED, "poisson leaves the draw to the server, and under a mask clients draw their cohort"),
        ("poisson", NOISED, ""),
        ("poisson", PRIVATE, ""),
        ("uniform", MASKED, ""),
        ("utility", {"pipeline": [*CLIPPED, "ring"]}, ""),
    ],
)
def test_who_is_drawn_where_privacy_is_promised(
    sampler: str, change: dict[str, Any], words: str, values: dict[str, Any]
) -> None:
    job = Job(**{**values, **change, "clients": {"sampler": sampler}, "privacy": {"delta": 1e-3}})
    if not words:
        prepare(job)
        return
    with pytest.raises(KeyProblem, match=words):
        prepare(job)


def test_a_round_without_anybody_spends_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    """Seed 5 draws nobody in some of six rounds of one of three clients on average: (2/3)^3 = 0.3 of them."""
    values |= {"clients": {"per_round": 1, "sampler": "poisson"}, "rounds": 6, "seed": 5, "privacy": {"delta": 1e-3}}
    done = weft.run(Job(**{**values, **NOISED}), tmp_path / "run")
    rows = read_journal(done.folder / "journal.jsonl")
    empty = [row["round"] for row in rows if "empty" in row]
    assert 0 < len(empty) < 6
    spent = [row["epsilon"] for row in rows[1:]]
    asked = Counter(name for row in rows[1:] for name in row["cohort"])
    for number, (before, after) in enumerate(pairwise([0.0, *spent]), start=1):
        most = max((sum(name in row["cohort"] for row in rows[1 : number + 1]) for name in asked), default=0)
        assert (after == before) if number in empty else after >= before
        assert (after > 0) == (most > 0)
    forecast = prepare(Job(**{**values, **NOISED}))
    (told,) = forecast.account().forecast(forecast.federation(), 6)
    assert told["epsilon"] == pytest.approx(spent[-1], rel=1e-5)
    assert sum(one["steps"] for one in told["mechanisms"]) == max(asked.values())


# --- in a round


def test_a_round_without_anybody_changes_nothing_and_says_so() -> None:
    toy = toys.toy(3)
    site = ToySite(toy, fedavg(), reference.MEAN)
    federation = replace(toy.federation(fedavg(), reference.MEAN), sampler=Sampler(lambda pool: [], fixed=False))
    server = Server({"adapter": toys.adapter()}, 4, {"a": 2})
    after, row = run_round(server, federation, Local([site]))
    assert after == replace(server, round=5)
    assert (row["empty"], row["cohort"], row["clients"]) == ("no client was drawn, so nothing changed", [], {})
    assert json.dumps(row)


def test_rules_refuse_samplings_that_they_are_not_defined_for() -> None:
    facts = replace(reference.FACTS, per_round=7, uniform=True)
    scaffold().check(facts)
    with pytest.raises(JobError, match="all are asked equally often"):
        scaffold().check(replace(facts, even=False))
    krum().check(facts)
    with pytest.raises(JobError, match="in every round, and this sampler may draw fewer"):
        krum().check(replace(facts, fixed=False))


@pytest.mark.parametrize(
    ("clients", "algorithm", "words"),
    [
        ({"sampler": "unifrom"}, "fedavg", "clients.sampler: there is no sampler `unifrom`; did you mean `uniform`"),
        ({"sampler": "weighted"}, "fedavg", "clients.sampler: weighted asks large clients more often"),
        ({"sampler": {"availability": {}}}, "fedavg", "clients.sampler: availability needs windows or a trace"),
        ({"sampler": {"availability": {"trace": "no.csv"}}}, "fedavg", "the trace no.csv cannot be read"),
        ({"sampler": "poisson"}, {"trimmed_mean": {}}, "algorithm: trimmed_mean with trim 1 needs 3 clients in every"),
        ({"devices": {"nobody-*": {}}}, "fedavg", "clients.devices.nobody-*: matches no client"),
        (
            {"devices": {"default": {"rank": 3}}},
            "flora",
            "clients.devices.default: 3 is more than adapter.lora.rank, 2",
        ),
        ({"devices": {"default": {"rank": 1}}}, "fedavg", "algorithm: fedavg needs one rank for all clients"),
        ({"devices": {"default": {"speed": 1}}}, "fedavg", "clients.devices.default.speed: unknown key"),
    ],
)
def test_a_job_that_cannot_be_is_refused(clients: Any, algorithm: Any, words: str, values: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        prepare(Job(**{**values, "clients": clients, "algorithm": algorithm}))
    assert words in str(caught.value)


def test_devices_give_ranks_and_names_go_before(values: dict[str, Any]) -> None:
    devices = {"default": {"rank": 2}, "site-[01]": {"rank": 1, "seconds_per_step": 3.0}}
    job = Job(**{**values, "algorithm": "flora", "clients": {"devices": devices, "ranks": {"site-1": 2}}})
    prepared = prepare(job)
    assert prepared.plan.ranks == {"site-0": 1, "site-1": 2, "site-2": 2}
    assert prepared.crowd.members["site-0"].device.seconds_per_step == 3.0
    with pytest.raises(KeyProblem):
        prepare(Job(**{**values, "clients": {"devices": devices, "ranks": {"site-1": 3}}}))


@pytest.mark.parametrize("sampler", ["poisson", "utility", "round_robin"])
def test_a_stopped_run_ends_with_the_same_bytes(sampler: str, values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"clients": {"per_round": 1, "sampler": sampler}, "rounds": 4, "seed": 5}
    whole = weft.run(Job(**values), tmp_path / "whole")
    with pytest.raises(Stop):
        weft.run(Job(**values), tmp_path / "stopped", watch=Stopping())
    again = weft.run(Job(**values), tmp_path / "stopped", resume=True)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes()
    cohorts = [[row.get("cohort") for row in read_journal(run.folder / "journal.jsonl")] for run in (whole, again)]
    assert cohorts[0] == cohorts[1]
    assert len({str(cohort) for cohort in cohorts[0]}) > 2
