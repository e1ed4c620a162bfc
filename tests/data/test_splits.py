"""Splits: each record goes to one client, by the seed alone, in the way that the split's name says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from weft.core.errors import JobError
from weft.data.by import by
from weft.data.dirichlet import dirichlet
from weft.data.iid import iid
from weft.data.quantity import quantity
from weft.data.records import Record, read
from weft.data.shards import shards
from weft.data.split import Split, assemble, client_name, distances, divide_test, manifest, natural
from weft.data.topic import topic, topics_of

ROOT = Path(__file__).parents[2]
BANKING = read("banking77/train.jsonl", folder=ROOT / "examples/data").records
MEDQUAD = read("medquad/train.jsonl", folder=ROOT / "examples/data").records
BOTH = [{**record, "source": f"site {place % 3}"} for place, record in enumerate(BANKING)]

SPLITS: dict[str, Callable[[], Split]] = {
    "iid": lambda: iid(7),
    "dirichlet": lambda: dirichlet(0.5, 7),
    "shards": lambda: shards(7),
    "by": lambda: by("source"),
    "quantity": lambda: quantity(7),
    "topic": lambda: topic(0.5, 7),
}


# --- every split


@pytest.mark.parametrize("name", SPLITS)
def test_complete_disjoint_sorted_and_named_in_order(name: str) -> None:
    found = SPLITS[name]().assign(BOTH, 7)
    assert sorted(place for places in found.values() for place in places) == list(range(len(BOTH)))
    assert all(places == sorted(places) and places for places in found.values())
    assert list(found) == sorted(found, key=natural)


@pytest.mark.parametrize("name", SPLITS)
def test_the_seed_decides_and_nothing_else(name: str) -> None:
    first, again, other = (SPLITS[name]().assign(BOTH, seed) for seed in (7, 7, 8))
    assert first == again
    assert (first != other) or name == "by"


@pytest.mark.parametrize("name", sorted(set(SPLITS) - {"by"}))
def test_more_clients_than_records_is_refused(name: str) -> None:
    with pytest.raises(JobError, match=r"[Ll]ower `(clients|topics)|lower `clients"):
        SPLITS[name]().assign(BOTH[:3], 7)


def test_no_split_depends_on_the_hash_seed_or_the_process() -> None:
    script = (
        f"import json, runpy; here = runpy.run_path({__file__!r}); records = here['BOTH']\n"
        "print(json.dumps({name: make().assign(records, 7) for name, make in here['SPLITS'].items()}))"
    )
    here = json.dumps({name: make().assign(BOTH, 7) for name, make in SPLITS.items()})
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "3"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == here


@settings(max_examples=40, deadline=None)
@given(total=some.integers(1, 60), clients=some.integers(1, 12), seed=some.integers(0, 2**40))
def test_any_size_is_complete_or_refused(total: int, clients: int, seed: int) -> None:
    records: list[Record] = [{"label": place % 4} for place in range(total)]
    least = {
        clients: (iid(clients), quantity(clients, alpha=0.3)),
        3 * clients: (shards(clients, per_client=3),),
    }
    for needed, splits in least.items():
        for split in splits:
            if total >= needed:
                found = split.assign(records, seed)
                assert len(found) == clients
                assert sorted(place for places in found.values() for place in places) == list(range(total))
            elif total < clients:
                with pytest.raises(JobError):
                    split.assign(records, seed)


# --- each split


def test_iid_sizes_and_names() -> None:
    """Ten records for three clients are 4, 3 and 3."""
    found = iid(3).assign([{}] * 10, 7)
    assert [len(places) for places in found.values()] == [4, 3, 3]
    assert list(found) == ["client-0", "client-1", "client-2"]
    assert list(iid(11).assign([{}] * 11, 7))[:2] == ["client-00", "client-01"]


def test_shards_give_few_classes() -> None:
    """20 classes of 50 rows in 20 shards are one class a shard, so two shards are 100 rows of two classes."""
    found = shards(10, 2).assign(BANKING, 7)
    assert {len(places) for places in found.values()} == {100}
    assert {len({BANKING[place]["label"] for place in places}) for places in found.values()} == {2}


def test_shards_sort_numbers_as_numbers() -> None:
    """As numbers 1, 2, 2, 10 are cut into (1, 2) and (2, 10); as text they would be (1, 10) and (2, 2)."""
    records = [{"label": label} for label in (10, 2, 1, 2)]
    found = shards(2, 1).assign(records, 7)
    assert sorted(sorted(records[place]["label"] for place in places) for places in found.values()) == [
        [1, 2],
        [2, 10],
    ]


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    """Negative control: at alpha 1000 the clients are nearly alike."""
    means = []
    for alpha in (0.1, 1.0, 1000.0):
        found = dirichlet(alpha, 5).assign(BANKING, 7)
        means.append(manifest(found, BANKING, seed=7)["jensen_shannon"]["mean"])
    assert means[0] > means[1] + 0.1 > means[2] + 0.2
    assert means[2] < 0.15


def test_dirichlet_takes_any_column_and_keeps_the_minimum() -> None:
    found = dirichlet(0.5, 4, by="source", minimum=30).assign(MEDQUAD, 7)
    assert min(map(len, found.values())) >= 30


def test_dirichlet_that_cannot_be_says_what_to_change() -> None:
    with pytest.raises(JobError, match=r"each client 400 or more of the 1000 records. Raise `alpha` \(0.5\)"):
        dirichlet(0.5, 4, minimum=400).assign(BANKING, 7)


@pytest.mark.filterwarnings("error")
def test_dirichlet_is_silent_about_draws_that_failed() -> None:
    dirichlet(0.05, 6).assign(BANKING, 7)


@pytest.mark.parametrize("make", [lambda: dirichlet(1.0, 2, by="labl"), lambda: shards(2, by="labl")])
def test_a_column_that_is_not_there(make: Callable[[], Split]) -> None:
    with pytest.raises(JobError, match=r"'labl'. Columns found: intent, label, text\. Name another column"):
        make().assign(BANKING, 7)


def test_quantity_sizes_spread_as_alpha_falls() -> None:
    def ratio(alpha: float) -> float:
        sizes = [len(places) for places in quantity(10, alpha, minimum=5).assign(BANKING, 7).values()]
        assert min(sizes) >= 5
        assert sum(sizes) == 1000
        return max(sizes) / median(sizes)

    assert ratio(0.3) > 2
    assert ratio(1000.0) < 1.2


def test_by_makes_a_client_of_each_institute() -> None:
    found = by("source").assign(MEDQUAD, 7)
    assert next(iter(found)) == "1_CancerGov_QA"
    assert len(found) == 9
    assert {len(places) for places in found.values()} == {40}


def test_by_refuses_two_values_with_one_name_and_a_record_without_value() -> None:
    with pytest.raises(JobError, match="two values of the column 'site' give one client name, 'north-1'"):
        by("site").assign([{"site": "north 1"}, {"site": "north/1"}], 7)
    with pytest.raises(JobError, match="record 2 has no text or number in the column 'site'"):
        by("site").assign([{"site": "north"}, {"site": None}], 7)


def test_topic_skew_grows_as_alpha_falls() -> None:
    """Labels are not given to the split, and yet the clients' labels differ, since topics follow them."""
    means = []
    for alpha in (0.1, 1000.0):
        found = topic(alpha, 5, topics=20).assign([{"text": record["text"]} for record in BANKING], 7)
        means.append(manifest(found, BANKING, seed=7)["jensen_shannon"]["mean"])
    assert means[0] > means[1] + 0.15


def test_topics_tell_two_subjects_apart() -> None:
    texts = ["the red card was stolen", "a stolen card", "rain and wind tomorrow", "wind with rain"]
    found = topics_of([{"question": text} for text in texts], topics=2, seed=7)
    assert found[0] == found[1] != found[2] == found[3]
    chats = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    assert topics_of(chats, topics=2, seed=7) == found


def test_topic_without_words_is_refused() -> None:
    with pytest.raises(JobError, match="no words to find topics by"):
        topic(1.0, 2, topics=2).assign([{"text": "..."}] * 4, 7)


# --- names and test records


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a", "a"),
        (3, "3"),
        ("../etc/x", "etc-x"),
        ("Ward 7 / east", "Ward-7-east"),
        ("é" * 80, "e" * 64),
        ("-a-", "a"),
    ],
)
def test_client_names_are_safe(value: object, name: str) -> None:
    assert client_name(value) == name


@pytest.mark.parametrize("value", ["", "...", "東京"])
def test_a_value_that_names_nothing(value: str) -> None:
    with pytest.raises(JobError, match="no letter A-Z or digit"):
        client_name(value)


def test_natural_order_counts() -> None:
    assert sorted(["b2", "b10", "a", "b1"], key=natural) == ["a", "b1", "b2", "b10"]


def test_an_empty_client_is_named() -> None:
    with pytest.raises(JobError, match=r"client-1 gets none of the 2 records\. Lower it\."):
        assemble([[0], [], [1]], "Lower it.")


def test_divide_test_by_column_and_without() -> None:
    records = [{"site": "new"}, {"site": "b"}, {"site": "a"}, {"site": "b"}]
    assert divide_test(iid(2), records, ["client-0", "client-1"]) == {"all": [0, 1, 2, 3]}
    divided = divide_test(by("site"), records, ["b", "a", "c"])
    assert list(divided.items()) == [("b", [1, 3]), ("a", [2]), ("new", [0])]


# --- the manifest


def test_distances_by_hand() -> None:
    """Equal shares 0 and nothing in common 1. Between (1, 0) and (1/2, 1/2), with the mean m = (3/4, 1/4):
    (log2(4/3) + log2(2/3)/2 + log2(2)/2) / 2 = (0.415037 - 0.292481 + 0.5) / 2 = 0.311278;
    its root is 0.557923.
    """
    found = distances([[4, 0], [8, 0], [0, 1], [3, 3]])
    assert found["matrix"][0] == [0.0, 0.0, 1.0, 0.557923]
    assert found["max"] == 1.0
    assert found["mean"] == pytest.approx((2 * 1.0 + 3 * 0.557923) / 6, abs=2e-6)
    assert distances([[1, 2]]) == {"mean": 0.0, "max": 0.0, "matrix": [[0.0]]}


def test_manifest_by_hand() -> None:
    records = [{"label": 10}, {"label": 2}, {"label": 10}]
    found = manifest({"a": [0, 2], "b": [1]}, records, seed=7)
    assert found["kind"] == "label"
    assert found["classes"] == ["2", "10"]
    assert found["clients"]["a"] == {"size": 2, "histogram": {"10": 2}, "records": [0, 2]}
    assert found["jensen_shannon"] == {"mean": 1.0, "max": 1.0, "matrix": [[0.0, 1.0], [1.0, 0.0]]}
    assert found["sizes"] == {"min": 1, "median": 1.5, "max": 2}
    assert json.loads(json.dumps(found)) == found


def test_manifest_hash_follows_the_assignment() -> None:
    records = [{"label": 1}, {"label": 1}]
    one, same, other = (
        manifest(assignment, records, seed=seed)["sha256"]
        for assignment, seed in (
            ({"a": [0], "b": [1]}, 7),
            ({"b": [1], "a": [0]}, 8),
            ({"a": [1], "b": [0]}, 7),
        )
    )
    assert one == same != other


def test_manifest_counts_a_column_or_topics_without_labels() -> None:
    assignment = by("source").assign(MEDQUAD, 7)
    found = manifest(assignment, MEDQUAD, column="qtype", seed=7)
    assert found["kind"] == "column"
    assert "symptoms" in found["classes"]
    found = manifest(assignment, MEDQUAD, seed=7)
    assert found["kind"] == "topic"
    assert len(found["classes"]) == 10
    assert manifest({"a": [0], "b": [1]}, [{"text": "."}, {"text": "?"}], seed=7)["kind"] == "none"


def test_many_clients_are_compared_at_even_places() -> None:
    """2,500 clients: every third, 834 of them. Of three kinds in turn these are all of the first, so 0; all of them
    would differ. A thousand are all compared.
    """
    records = [{"label": place % 3} for place in range(2500)]
    found = manifest({f"c{place}": [place] for place in range(2500)}, records, seed=7)["jensen_shannon"]
    assert found == {"mean": 0.0, "max": 0.0, "clients": 834}
    fewer = manifest({f"c{place}": [place] for place in range(1000)}, records, seed=7)["jensen_shannon"]
    assert "clients" not in fewer
    assert fewer["max"] == 1.0
