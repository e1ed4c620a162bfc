"""fedavg: the weighted mean, by hand; one client alone, equal clients and one step are what they must be."""

import pytest
import torch

from weft.algorithms.fedavg import fedavg
from weft.core import trees
from weft.core.types import Tally
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Client, Toy
from weft.transforms.weigh import weigh

MEAN = [("weigh", weigh())]


def test_the_server_takes_the_mean_as_it_is() -> None:
    update = {"adapter": {"w": torch.tensor([5.0])}}
    state = fedavg().server({"adapter": {"w": torch.tensor([1.0])}}, update, Tally(1, {"a": 1}, {"a": 1}))
    assert state["adapter"]["w"].tolist() == [5.0]
    assert not fedavg().personal
    assert fedavg().sends == ("adapter",)
    assert fedavg().keep(toys.adapter()) == {}


def test_two_clients_in_closed_form() -> None:
    """One step of lr 0.05 from w0 takes client k to w0 + 0.05 (t_k - w0); with 1 and 3 examples the mean is
    w0 + 0.05 (t_a + 3 t_b - 4 w0) / 4.
    """
    clients = {"a": toys.client("a", 1, steps=1), "b": toys.client("b", 3, steps=1)}
    played = toys.play(fedavg, MEAN, 1, toy=Toy(clients, 2))
    first, (a, b) = toys.adapter()["n.bias"], (clients[name].target["n.bias"] for name in "ab")
    expected = first + 0.05 * (a + 3 * b - 4 * first) / 4
    assert torch.allclose(played.servers[-1].state["adapter"]["n.bias"], expected, rtol=1e-6)


def test_one_full_step_is_pooled_gradient_descent() -> None:
    """The mean of one step each is one step on the mean gradient, for the LoRA factors as well."""
    clients = {name: toys.client(name, size, steps=1) for name, size in (("a", 2), ("b", 5), ("c", 1))}
    played = toys.play(fedavg, MEAN, 1, toy=Toy(clients, 3))
    first = toys.adapter()
    for name, value in played.servers[-1].state["adapter"].items():
        gradient = sum(client.examples / 8 * client.gradient(first)[name] for client in clients.values())
        assert torch.allclose(value, first[name] - 0.05 * gradient, atol=1e-6)


def test_one_client_alone_is_plain_training() -> None:
    """After R rounds of K steps the bits are those of R K steps without a server; w = t + 0.95^12 (w0 - t)."""
    one = Toy({"a": toys.client("a", 7, steps=4)}, 1)
    played = toys.play(fedavg, MEAN, 3, toy=one)
    alone = toys.play(fedavg, MEAN, 1, toy=Toy({"a": toys.client("a", 7, steps=12)}, 1))
    assert bits(played.servers[-1].state) == bits(alone.servers[-1].state)
    target, first = one.clients["a"].target["n.weight"], toys.adapter()["n.weight"]
    expected = target + 0.95**12 * (first - target)
    assert torch.allclose(played.used["a"]["n.weight"], expected, atol=1e-5)


def test_equal_clients_are_one_client() -> None:
    one = toys.play(fedavg, MEAN, 2, toy=Toy({"a": toys.client("a", 3)}, 1))
    same = {name: Client(toys.client("a").target, size) for name, size in (("a", 1), ("b", 5), ("c", 3))}
    many = toys.play(fedavg, MEAN, 2, toy=Toy(same, 3))
    assert bits(one.servers[-1].state) == bits(many.servers[-1].state)


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """The negative control of every exact method: A and B averaged apart miss mean(B A)."""
    clients = {name: toys.client(name) for name in "ab"}
    start = toys.play(fedavg, MEAN, 2, toy=Toy(clients, 2)).servers[-1].state["adapter"]
    apart = [toys.play(fedavg, MEAN, 1, toy=Toy({name: clients[name]}, 1)).used[name] for name in "ab"]
    mean = {name: (apart[0][name] + apart[1][name]) / 2 for name in start}
    products = [toys.effective(tensors)["m"] for tensors in apart]
    assert not torch.allclose(toys.effective(mean)["m"], (products[0] + products[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("per_round", [1, 2, 5])
def test_clients_agree_in_the_end(per_round: int) -> None:
    """Clients with one optimum end there, whoever is asked."""
    same = {name: Client(toys.client("a").target) for name in "abcde"}
    played = toys.play(fedavg, MEAN, 60, toy=Toy(same, per_round))
    goal, found = same["a"].target["n.bias"], played.used["a"]["n.bias"]
    assert trees.norm({"n": found - goal}) < 1e-4
