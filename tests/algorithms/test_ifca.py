"""ifca: each client in the cluster of least loss; fedavg within clusters; recovered where clients fall apart."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.algorithms import reference
from tests.algorithms.reference import FACTS, MEAN, UNIFORM
from weft.algorithms.experts import MARK
from weft.algorithms.fedavg import fedavg
from weft.algorithms.ifca import ifca
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Tally, Tensors
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Client, Toy, ToySite


def test_the_server_by_hand() -> None:
    """A (weight 1) and b (3) train cluster 0 to 2 and 6, c (4) trains cluster 1 to 5; cluster 2 nobody.

    The means are (2 + 18) / 8 = 2.5 with shares 4/8, and 20/8 with 4/8: 5 and 5; cluster 2 stays 7.
    """
    state = {f"{MARK}cluster-{i}": {"w": torch.tensor([value])} for i, value in enumerate((0.0, 0.0, 7.0))}
    update = {f"{MARK}cluster-{i}": {"w": torch.tensor([value])} for i, value in enumerate((2.5, 2.5, 0.0))}
    after = ifca(3).server(state, update | {"share": {"share": torch.tensor([0.5, 0.5, 0.0])}}, Tally(1, {}, {}))
    assert [float(tree["w"]) for tree in after.values()] == [5.0, 5.0, 7.0]


def halves() -> Toy:
    """Return six clients around two optima that are far apart."""
    members = {}
    for i in range(6):
        plain = toys.client(f"c{i}", 1 + i % 3, 3)
        sign = -1.0 if i % 2 else 1.0
        members[f"c{i}"] = replace(plain, target={n: sign * v for n, v in toys.client("x").target.items()})
    return Toy(members, 6)


def chosen(make: Callable[[], Algorithm], rounds: int, toy: Toy) -> dict[str, int]:
    played = toys.play(make, MEAN, rounds, toy=toy)
    server = played.servers[-1]
    clusters = [server.state[part] for part in sorted(server.state)]
    return {
        name: next(i for i, cluster in enumerate(clusters) if bits(cluster) == bits(used))
        for name, used in played.used.items()
    }


def test_clients_that_fall_apart_are_recovered() -> None:
    found = chosen(lambda: ifca(2), 12, halves())
    assert found["c0"] == found["c2"] == found["c4"] != found["c1"] == found["c3"] == found["c5"]
    played = toys.play(lambda: ifca(2), MEAN, 40, toy=halves())
    shared = toys.play(fedavg, MEAN, 40, toy=halves())
    for name, client in halves().clients.items():
        assert client.loss(played.used[name]) < 0.2 * client.loss(shared.used[name])


def test_one_cluster_is_fedavg_bit_for_bit() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (lambda: ifca(1), fedavg))
    assert bits(one.servers[-1].state[f"{MARK}cluster-0"]) == bits(other.servers[-1].state["adapter"])


def dealt(number: int, name: str, clusters: int) -> int:
    """Return the cluster that a client is dealt to: the largest of as many normal draws at its address."""
    return int(toys.draw((clusters,), number, name, "cluster").argmax())


def in_float64(toy: Toy, rounds: int, best: Callable[..., int] = min) -> list[Tensors]:
    clusters = [reference.wide(toys.adapter()) for _ in range(3)]
    for number, cohort in enumerate(reference.cohorts(toy, rounds), 1):
        rows: dict[int, dict[str, Tensors]] = {}
        for name in cohort:
            losses = [toy.clients[name].loss(cluster) for cluster in clusters]
            place = dealt(number, name, 3) if number == 1 else losses.index(best(losses))
            rows.setdefault(place, {})[name] = reference.trained(toy.clients[name], clusters[place], toy.lr)
        for place, members in rows.items():
            clusters[place] = reference.mean(members, reference.sizes(toy))
    return clusters


def far(best: Callable[..., int] = min) -> float:
    toy = Toy({**halves().clients, "z": toys.client("z", 2, 4)}, 4)
    state = toys.play(lambda: ifca(3), MEAN, 5, toy=toy).servers[-1].state
    expected = in_float64(toy, 5, best)
    return max(reference.far(state[part], want) for part, want in zip(sorted(state), expected, strict=True))


def test_five_rounds_are_those_of_the_reference() -> None:
    assert far() < 1e-4


def test_planted_bugs_are_caught() -> None:
    """The cluster of largest loss; and a mean over all clients in place of a cluster's own."""
    assert far(max) > 0.1

    def server(state: State, update: State, tally: Tally) -> State:
        return {part: update[part] for part in state}

    found = chosen(lambda: replace(ifca(2), server=server), 6, halves())
    played = toys.play(lambda: replace(ifca(2), server=server), MEAN, 12, toy=halves())
    best = [halves().clients[name].loss(played.used[name]) for name in found]
    right = toys.play(lambda: ifca(2), MEAN, 12, toy=halves())
    assert min(best) > 2 * max(halves().clients[name].loss(right.used[name]) for name in found)


def test_clusters_begin_alike_and_apart_from_each_other_in_memory() -> None:
    first = ifca(3).init(toys.adapter())
    assert len(first) == 3
    assert all(bits(cluster) == bits(toys.adapter()) for cluster in first.values())
    assert len({value.data_ptr() for cluster in first.values() for value in cluster.values()}) == 3 * len(toys.SHAPES)


def test_control_without_dealing_everybody_stays_in_the_first_cluster() -> None:
    state = toys.play(lambda: ifca(2, dealt=0), MEAN, 4, toy=halves()).servers[-1].state
    assert bits(state[f"{MARK}cluster-1"]) == bits(toys.adapter())


def test_what_is_sent_is_one_cluster_and_zeros() -> None:
    toy = toys.toy(5)
    state = ifca(2).init(toys.adapter())
    from weft.core.types import Order

    for reply in ToySite(toy, ifca(2), UNIFORM).handle(Order("train", 1, tuple(toy.clients), state)):
        place = int(reply.update["share"]["share"].argmax())
        assert reply.update["share"]["share"].sum() == 1
        assert not any(value.any() for value in reply.update[f"{MARK}cluster-{1 - place}"].values())
        assert all(value.any() for value in reply.update[f"{MARK}cluster-{place}"].values())


@pytest.mark.parametrize(
    "change",
    [{"mixed_ranks": True}, {"moments": "keep"}, {"noise": 1.0}, {"pipeline": ("delta", "weigh")}, {"dp": True}],
)
def test_what_it_is_not_defined_for_is_refused(change: dict[str, Any]) -> None:
    ifca().check(FACTS)
    with pytest.raises(JobError, match="ifca"):
        ifca().check(replace(FACTS, **change))


def test_the_choice_is_the_least_loss() -> None:
    far_away = Client({n: v + 5 for n, v in toys.client("x").target.items()})
    work = toys.ToyWork(
        ("a",), (far_away,), 0.1, torch.ones(1), torch.ones(1), torch.zeros(1), trees.expand(toys.adapter(), 1), 1
    )
    near = {n: v.clone() for n, v in toys.adapter().items()}
    near["n.weight"] = far_away.target["n.weight"]
    losses = [float(work.loss(trees.expand(one, 1))) for one in (toys.adapter(), near)]
    assert losses[1] < losses[0]
