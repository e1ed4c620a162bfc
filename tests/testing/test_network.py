"""Over a bad network a run ends in the bytes of a good one, and nothing is counted twice."""

import contextlib
from collections import Counter
from dataclasses import replace

import pytest

from weft.algorithms.fedavgm import fedavgm
from weft.algorithms.scaffold import scaffold
from weft.core.errors import RunError
from weft.core.failures import Policy
from weft.core.round import Record, run_round
from weft.core.types import Algorithm, Server
from weft.links import wire
from weft.links.local import Local
from weft.testing import toys
from weft.testing.network import Network
from weft.transforms.weigh import weigh

PIPELINE = [("weigh", weigh())]
PATIENT = Policy(on_client_failure="retry", retries=60, quorum=1.0)


def played(
    algorithm: Algorithm, seed: int | None, policy: Policy = PATIENT, digest: bool = True
) -> tuple[bytes, list[Record], Counter[str]]:
    """Return the last state, the records and the faults of three rounds with three of five clients each."""
    toy = toys.toy()
    site = toys.ToySite(toy, algorithm, PIPELINE)
    network = Network(Local([site]), seed or 0, digest=digest)
    federation = replace(toy.federation(algorithm, PIPELINE), policy=policy)
    server, records = Server(algorithm.init(toys.adapter())), []
    for _ in range(3):
        server, record = run_round(server, federation, network if seed is not None else Local([site]))
        records.append(record)
    return wire.pack(server.state), records, network.faults


@pytest.mark.parametrize("algorithm", [fedavgm(), scaffold()], ids=["fedavgm", "scaffold"])
def test_the_last_state_is_that_of_a_good_network(algorithm: Algorithm) -> None:
    """Forty seeds; benchmarks/network.py takes a thousand. Scaffold's clients remember, so `since` is tried as well."""
    expected, clean, _ = played(algorithm, None)
    seen: Counter[str] = Counter()
    for seed in range(40):
        state, records, faults = played(algorithm, seed)
        seen += faults
        assert state == expected, f"network seed {seed}"
        for row, good in zip(records, clean, strict=True):
            assert {n: c["weight"] for n, c in row["clients"].items()} == {
                n: c["weight"] for n, c in good["clients"].items()
            }, f"network seed {seed}"
    assert min(seen[fault] for fault in ("lost", "late", "doubled", "corrupted")) > 40


def test_a_network_whose_damage_nobody_sees_would_show() -> None:
    """Negative control: without the digest, flipped bits reach the sum in some of forty seeds."""
    expected, _, _ = played(fedavgm(), None)
    wrong = 0
    for seed in range(40):
        try:
            wrong += played(fedavgm(), seed, digest=False)[0] != expected
        except RunError:
            wrong += 1
    assert wrong > 5


def test_dropping_says_who_and_why_and_never_counts_twice() -> None:
    policy = Policy(on_client_failure="drop", quorum=0.01)
    reasons: Counter[str] = Counter()
    records: list[Record] = []
    for seed in range(40):
        with contextlib.suppress(RunError):  # all three lost: below any quorum
            records = played(fedavgm(), seed, policy)[1]
        for record in records:
            assert sorted([*record["clients"], *record["dropped"]]) == record["cohort"]
            reasons.update(record["dropped"].values())
    assert reasons["no reply"] > 10
    assert reasons["the message is damaged"] > 5


def test_the_same_seed_plays_the_same_faults() -> None:
    assert played(fedavgm(), 5)[1:] == played(fedavgm(), 5)[1:]
