"""What every split must pass: nothing lost, nothing twice, nothing by chance."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from weft.data.split import Split
from weft.testing.sound import require, run_all, running
from weft.testing.tiny import RECORDS

Records = Sequence[Mapping[str, Any]]
MakeSplit = Callable[[], Split]


def _assigned(make: MakeSplit, records: Records, seed: int = 7) -> dict[str, list[int]]:
    with running("the split fails"):
        return make().assign([dict(record) for record in records], seed)


def check_partition(make: MakeSplit, records: Records = RECORDS) -> None:
    """Give each record to exactly one client."""
    places = sorted(place for part in _assigned(make, records).values() for place in part)
    require(len(places) == len(set(places)), "a record goes to two clients")
    require(places == list(range(len(records))), f"{len(places)} of {len(records)} records have a client")


def check_nobody_empty(make: MakeSplit, records: Records = RECORDS) -> None:
    """Give each client a record, in the order of the source."""
    for name, places in _assigned(make, records).items():
        require(bool(places), f"client {name} has no record")
        require(list(places) == sorted(places), f"the records of client {name} are out of order")


def check_seed(make: MakeSplit, records: Records = RECORDS) -> None:
    """Depend on the records and the seed alone, and leave the records as they were."""
    with torch.random.fork_rng():
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(list(_assigned(make, records).items()))
    require(results[0] == results[1], "the same seed gives another split")
    given = [dict(record) for record in records]
    make().assign(given, 7)
    require(given == [dict(record) for record in records], "the split changes the records")


SPLIT = (check_partition, check_nobody_empty, check_seed)


def check_split(make: MakeSplit, records: Records = RECORDS, waive: Collection[str] = ()) -> None:
    """Run all checks of a split."""
    run_all(SPLIT, waive, make, records)
