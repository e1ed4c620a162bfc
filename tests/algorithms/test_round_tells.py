"""Every rule's round tells drift, cosine and norms of what its updates do: dW for LoRA, whatever the factors."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.algorithms import reference
from tests.algorithms.attacks import turns
from tests.test_conformance import EXAMPLES
from weft import plugins
from weft.core import trees
from weft.core.round import run_round
from weft.core.types import Algorithm, Order, Reply, Server, Tensors
from weft.links.local import Local
from weft.testing import toys
from weft.testing.toys import Toy, ToySite

ALL = plugins.names("algorithm")


def made(name: str) -> Algorithm:
    how = EXAMPLES.get(("algorithm", name))
    built: Algorithm = plugins.build(plugins.parse("algorithm", {name: how.keys if how else {}}), "algorithm")
    return built


def record(algorithm: Algorithm, toy: Toy | None = None) -> dict[str, Any]:
    toy = toy or toys.toy(5)
    site = ToySite(toy, algorithm, reference.MEAN)
    server = Server(algorithm.init(toys.adapter()))
    for _ in range(2):
        server, row = run_round(server, toy.federation(algorithm, reference.MEAN), Local([site]))
    return row


@pytest.mark.parametrize("name", ALL)
def test_every_rule_tells(name: str) -> None:
    algorithm = made(name)
    row = record(algorithm)
    if not algorithm.sends:
        assert row["drift"] is None
        return
    if algorithm.personal and "adapter" not in algorithm.sends:
        return
    assert row["drift"] > 0
    assert -1 <= row["cosine"] <= 1
    assert all(client["update_norm"] > 0 for client in row["clients"].values())


def effective_change(before: Tensors, after: Tensors) -> Tensors:
    return trees.subtract(toys.effective(reference.wide(after)), toys.effective(reference.wide(before)))


def test_the_norm_is_that_of_dw_and_heads_together() -> None:
    """Against dense products in float64; the toy's layer has 6 inputs, so nothing is estimated."""
    toy, algorithm = toys.toy(5), made("fedavg")
    row = run_round(
        Server({"adapter": toys.adapter()}),
        toy.federation(algorithm, reference.MEAN),
        Local([ToySite(toy, algorithm, reference.MEAN)]),
    )[1]
    changes = {}
    for name, client in toy.clients.items():
        ended = reference.trained(client, reference.wide(toys.adapter()), toy.lr)
        changes[name] = effective_change(toys.adapter(), ended)
        assert row["clients"][name]["update_norm"] == pytest.approx(trees.norm(changes[name]), rel=1e-4)
    mean = {n: sum(c[n] for c in changes.values()) / 5 for n in next(iter(changes.values()))}
    apart = sum(trees.norm(trees.subtract(change, mean)) ** 2 for change in changes.values()) / 5
    assert row["drift"] == pytest.approx(apart**0.5, rel=1e-4)


@pytest.mark.parametrize("turn", turns())
def test_no_gauge_changes_what_is_told(turn: torch.Tensor) -> None:
    """A client that sends (B R, R^-1 A) moved exactly as far; its factors did not."""
    toy, algorithm = toys.toy(5), made("fedavg")

    class Turning(Local):
        def exchange(self, order: Order) -> Any:
            for reply in super().exchange(order):
                yield turned(reply) if reply.client == "b" else reply

    def turned(reply: Reply) -> Reply:
        return replace(reply, update={"adapter": reference.regauged(reply.update["adapter"], turn)})

    site = ToySite(toy, algorithm, reference.MEAN)
    federation = toy.federation(algorithm, reference.MEAN)
    plain, other = (
        run_round(Server({"adapter": toys.adapter()}), federation, link([site]))[1] for link in (Local, Turning)
    )
    for key in ("drift", "cosine"):
        assert other[key] == pytest.approx(plain[key], rel=1e-3)
    norms = [row["clients"]["b"]["update_norm"] for row in (plain, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_control_on_factors_the_gauge_decides() -> None:
    start = toys.adapter()
    ended = {**start, "m.lora_B.default.weight": torch.ones(3, 2)}
    turned = reference.regauged(ended, turns()[2])
    lengths = [trees.norm(trees.subtract(one, start)) for one in (ended, turned)]
    assert lengths[1] > 100 * lengths[0]


@pytest.mark.parametrize(
    "update",
    [
        {"trained": {}},
        {"adapter": toys.adapter()},
        {"trained": {**toys.adapter(), "m.lora_A.default.weight": torch.ones(2, 7)}},
        {"trained": {**toys.adapter(), "m.lora_A.default.weight": torch.ones(3)}},
    ],
)
def test_a_reply_of_other_names_or_layers_is_refused_where_ranks_are_free(update: Any) -> None:
    from weft.core.errors import RunError

    toy, algorithm = toys.toy(5), made("flexlora")

    class Wrong(Local):
        def exchange(self, order: Order) -> Any:
            for reply in super().exchange(order):
                yield replace(reply, update=update) if reply.client == "b" else reply

    federation = toy.federation(algorithm, reference.MEAN)
    with pytest.raises(RunError, match="round 1: client b: "):
        run_round(Server(algorithm.init(toys.adapter())), federation, Wrong([ToySite(toy, algorithm, reference.MEAN)]))
