"""local_heads: what the patterns name stays at its client; the rest is fedavg."""

import pytest
import torch

from weft.algorithms.fedavg import fedavg
from weft.algorithms.local import local
from weft.algorithms.local_heads import local_heads
from weft.core import trees
from weft.core.errors import JobError
from weft.core.round import run_round
from weft.core.types import Algorithm, Order, Server
from weft.links.local import Local
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.toys import Client, Toy, ToySite
from weft.transforms.weigh import weigh

MEAN = [("weigh", weigh())]


def heads() -> Algorithm:
    return local_heads(("n.*",))


def test_two_clients_in_closed_form() -> None:
    """3 rounds of 4 steps at 0.05: n.bias of client k ends at t_k + 0.95^12 (w0 - t_k), as if it were alone."""
    toy = Toy({name: toys.client(name) for name in "ab"}, 2)
    played = toys.play(heads, MEAN, 3, toy=toy)
    for name, client in toy.clients.items():
        target, first = client.target["n.bias"], toys.adapter()["n.bias"]
        assert torch.allclose(played.used[name]["n.bias"], target + 0.95**12 * (first - target), atol=1e-5)
    shared = [played.used[name]["m.lora_A.default.weight"] for name in "ab"]
    assert torch.equal(*shared)


def test_opposite_clients_both_reach_their_own() -> None:
    """Two clients whose heads want the opposite: each ends at its own, where the mean would be zero for both."""
    target = toys.client("a").target
    other = target | {"n.bias": -target["n.bias"]}
    toy = Toy({"a": Client(target, steps=20), "b": Client(other, steps=20)}, 2)
    own, common = (toys.play(make, MEAN, 10, toy=toy).used for make in (heads, fedavg))
    for name, sign in (("a", 1), ("b", -1)):
        assert torch.allclose(own[name]["n.bias"], sign * target["n.bias"], atol=1e-3)
        assert trees.norm({"n": common[name]["n.bias"]}) < 1e-3


def travelled(make: object) -> set[str]:
    """Return the names of all tensors that are sent in two rounds."""
    toy, algorithm = toys.toy(per_round=5), make()  # type: ignore[operator]
    site, names = ToySite(toy, algorithm, MEAN), set[str]()

    class Watched:
        def exchange(self, order: Order) -> list[object]:
            replies = list(Local([site]).exchange(order))
            names.update(trees.flatten(order.state))
            names.update(name for reply in replies for name in trees.flatten(reply.update))
            return list(replies)

    server = Server(algorithm.init(toys.adapter()))
    for _ in range(2):
        server, _ = run_round(server, toy.federation(algorithm, MEAN), Watched())  # type: ignore[arg-type]
    return names


def test_what_stays_is_never_on_the_wire() -> None:
    assert travelled(heads) == {"adapter/m.lora_A.default.weight", "adapter/m.lora_B.default.weight"}
    assert any("n.bias" in name for name in travelled(fedavg))  # the control: it would be seen


def test_what_is_shared_is_fedavg_and_what_stays_is_local() -> None:
    """The losses of m, n.bias and n.weight do not touch, so that each part goes its own way."""
    toy = toys.toy(per_round=5)
    mine, shared, alone = (toys.play(make, MEAN, 2, toy=toy).used for make in (heads, fedavg, local))
    for name in toy.clients:
        for tensor, value in mine[name].items():
            assert torch.equal(value, (alone if tensor.startswith("n.") else shared)[name][tensor])


def test_other_clients_heads_change_nothing_of_mine() -> None:
    """With the shared part empty of movement: only n.* differ between the two federations."""
    mine = {name: toys.client(name) for name in "ab"}
    far = mine["b"].target | {"n.bias": 100 * mine["b"].target["n.bias"]}
    one, two = (toys.play(heads, MEAN, 3, toy=Toy({"a": mine["a"], "b": b}, 2)) for b in (mine["b"], Client(far)))
    assert bits(one.used["a"]) == bits(two.used["a"])


def test_who_was_never_asked_uses_the_shared_part_and_the_first_head() -> None:
    toy = Toy({name: toys.client(name) for name in "abc"}, 1)
    played = toys.play(heads, MEAN, 1, toy=toy)
    (asked,) = played.servers[-1].since
    for name in set("abc") - {asked}:
        assert torch.equal(played.used[name]["n.bias"], toys.adapter()["n.bias"])
        assert torch.equal(played.used[name]["m.lora_B.default.weight"], played.used[asked]["m.lora_B.default.weight"])


@pytest.mark.parametrize(("stays", "word"), [(("*.modules_to_save.*",), "none"), (("*",), "all"), (("N.*",), "none")])
def test_patterns_that_decide_nothing_are_refused(stays: tuple[str, ...], word: str) -> None:
    with pytest.raises(JobError, match=rf"algorithm\.local_heads\.stays: .* match {word} of the 4 trained tensors"):
        local_heads(stays).init(toys.adapter())


def leaking() -> Algorithm:
    """The planted bug: what stays is sent as well, as a filter on `lora` in the names does the other way round."""
    from dataclasses import replace

    whole = heads()

    def client(work, received, kept):  # type: ignore[no-untyped-def]
        ended = work.train(trees.merged(received["adapter"], kept["own"]))
        return {"adapter": ended}, whole.keep(ended)

    return replace(whole, client=client, init=lambda adapter: {"adapter": adapter})


def test_a_leak_is_caught() -> None:
    assert any("n.bias" in name for name in travelled(leaking))


def test_mixed_ranks_are_refused() -> None:
    from tests.algorithms.lora_cases import facts

    local_heads().check(facts(low_rank=False, adapter="ia3"))
    with pytest.raises(JobError, match="local_heads needs one rank"):
        local_heads().check(facts(mixed_ranks=True))
