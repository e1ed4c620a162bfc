"""local: each client alone, from its own last adapter; nothing is sent and the server learns nothing."""

import torch

from weft.algorithms.local import local
from weft.core.round import run_round
from weft.core.types import Server
from weft.links.local import Local
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Toy, ToySite
from weft.transforms.weigh import weigh

MEAN = [("weigh", weigh())]


def test_each_client_goes_on_from_its_own() -> None:
    """Three rounds of 4 steps: w = t_k + 0.95^12 (w0 - t_k) for each client k."""
    toy = Toy({name: toys.client(name) for name in "ab"}, 2)
    played = toys.play(local, MEAN, 3, toy=toy)
    for name, client in toy.clients.items():
        target, first = client.target["n.bias"], toys.adapter()["n.bias"]
        assert torch.allclose(played.used[name]["n.bias"], target + 0.95**12 * (first - target), atol=1e-5)


def test_the_server_stays_as_it_was_and_nothing_travels() -> None:
    toy = toys.toy(per_round=5)
    algorithm = local()
    server = Server(algorithm.init(toys.adapter()))
    link = Local([ToySite(toy, algorithm, MEAN)])
    after, record = run_round(server, toy.federation(algorithm, MEAN), link)
    assert bits(after.state) == bits(server.state)
    assert (record["bytes_up"], record["bytes_down"]) == (0, 0)
    assert record["aggregation_error"] is None
    assert algorithm.sends == ()
    assert algorithm.personal


def test_who_is_not_asked_uses_the_first_adapter() -> None:
    toy = Toy({name: toys.client(name) for name in "abc"}, 1)
    played = toys.play(local, MEAN, 1, toy=toy)
    trained = [name for name, used in played.used.items() if bits(used) != bits(toys.adapter())]
    assert trained == list(played.servers[-1].since)
    assert len(trained) == 1


def test_other_clients_change_nothing() -> None:
    alone = toys.play(local, MEAN, 3, toy=Toy({"a": toys.client("a")}, 1))
    among = toys.play(local, MEAN, 3, toy=Toy({name: toys.client(name) for name in "abc"}, 3))
    assert bits(alone.used["a"]) == bits(among.used["a"])
