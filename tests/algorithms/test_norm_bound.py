"""norm_bound: shortened updates by hand, against a reference, as fedavg where none is long, and a bound for liars."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from tests.algorithms import reference
from tests.algorithms.attacks import attacked, honest, received
from tests.algorithms.reference import FACTS, MEAN, combined
from weft.algorithms.fedavg import fedavg
from weft.algorithms.norm_bound import norm_bound
from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.core.types import Algorithm, Tensors
from weft.testing import toys
from weft.testing.sound import bits


def of(updates: Sequence[Sequence[float]], weights: Sequence[int] = (), start: float = 0.0) -> list[float]:
    rows = [{"w": torch.tensor(update) + start} for update in updates]
    return (combined(norm_bound(norm=1.0), rows, {"w": torch.full((2,), start)}, weights)["w"] - start).tolist()


def test_shortened_by_hand() -> None:
    """Norm 1. (3, 4) has length 5 and becomes (0.6, 0.8); (0.3, 0.4) stays. The mean is (0.45, 0.6); with weights 1
    and 3 it is ((0.6 + 0.9) / 4, (0.8 + 1.2) / 4).
    """
    assert of([[3.0, 4.0], [0.3, 0.4]]) == pytest.approx([0.45, 0.6])
    assert of([[3.0, 4.0], [0.3, 0.4]], [1, 3]) == pytest.approx([0.375, 0.5])
    assert of([[3.0, 4.0], [0.3, 0.4]], start=8.0) == pytest.approx([0.45, 0.6], abs=1e-6)


def test_a_client_that_did_not_move_counts_as_zero() -> None:
    assert of([[0.0, 0.0], [3.0, 4.0]]) == pytest.approx([0.3, 0.4])
    assert of([[0.0, 0.0]]) == [0.0, 0.0]


def in_float64(toy: toys.Toy, rounds: int, norm: float) -> Tensors:
    w = reference.wide(toys.adapter())
    for cohort in reference.cohorts(toy, rounds):
        rows = {}
        for name in cohort:
            change = trees.subtract(reference.trained(toy.clients[name], w, toy.lr), w)
            rows[name] = trees.add(w, change, min(1.0, norm / trees.norm(change)))
        w = reference.mean(rows, reference.sizes(toy))
    return w


def off(make: Callable[[], Algorithm]) -> float:
    toy = toys.toy()
    return reference.far(reference.ended(make, toy), in_float64(toy, 5, 0.5))


def test_five_rounds_are_those_of_the_reference() -> None:
    assert off(lambda: norm_bound(norm=0.5)) < 1e-5
    assert off(fedavg) > 1e-2


def test_where_none_is_long_the_bits_are_those_of_fedavg() -> None:
    one, other = (toys.play(make, MEAN, 4, toy=toys.toy()) for make in (fedavg, lambda: norm_bound(norm=1e3)))
    assert bits(one.used) == bits(other.used)


@pytest.mark.parametrize("byzantine", [1, 3])
@pytest.mark.parametrize("attack", ["huge", "sign-flipped", "scaled", "far away"])
def test_liars_move_the_result_by_no_more_than_their_share(attack: str, byzantine: int) -> None:
    """F of 9 instead of standing still: at most f / 9 norm. A mean moves by 1e4 and more."""
    good, everyone = attacked(attack, byzantine)
    still = [received()] * byzantine + good
    result, quiet = (combined(norm_bound(norm=2.0), rows, received()) for rows in (everyone, still))
    assert trees.norm(trees.subtract(result, quiet)) <= 2.0 * byzantine / 9 + 1e-5
    plain, quiet = ({n: v.double().mean(0) for n, v in trees.stack(rows).items()} for rows in (everyone, still))
    assert trees.norm(trees.subtract(plain, quiet)) > 2.0 * byzantine / 9


def test_what_it_refuses() -> None:
    with pytest.raises(JobError, match="norm_bound needs one rank"):
        norm_bound(norm=1.0).check(replace(FACTS, mixed_ranks=True))
    assert norm_bound(norm=1.0).combine
    rows = honest(2)
    del rows[1]["n.bias"]
    with pytest.raises(RunError, match=r"client c1: adapter/n\.bias is missing"):
        combined(norm_bound(norm=1.0), rows, received())


# --- planted mistakes


def shortening(change: Callable[[Tensors, Tensors], Tensors]) -> Callable[[], Algorithm]:
    """Return a rule that shortens otherwise: (trained, start) -> trained, at norm 0.5."""

    def combine(replies: Sequence, state: dict, tally: object) -> dict:
        rows = {r.client: reference.wide(change(r.update["adapter"], state["adapter"])) for r in replies}
        weights = {r.client: float(r.weight) for r in replies}
        return {"adapter": {n: v.float() for n, v in reference.mean(rows, weights).items()}}

    return lambda: replace(norm_bound(norm=0.5), combine=combine)


def right(trained: Tensors, start: Tensors) -> Tensors:
    change = trees.subtract(trained, start)
    return trees.add(start, change, min(1.0, 0.5 / trees.norm(change)))


def of_the_weights(trained: Tensors, start: Tensors) -> Tensors:
    return {n: v * min(1.0, 0.5 / trees.norm(trained)) for n, v in trained.items()}


def each_tensor(trained: Tensors, start: Tensors) -> Tensors:
    change = trees.subtract(trained, start)
    return {n: start[n] + v * min(1.0, 0.5 / float(v.norm())) for n, v in change.items()}


def always(trained: Tensors, start: Tensors) -> Tensors:
    """Give every update the norm, short ones as well; 0 / 0 for one that did not move."""
    change = trees.subtract(trained, start)
    return trees.add(start, change, 0.5 / trees.norm(change))


@pytest.mark.parametrize("broken", [of_the_weights, each_tensor, always])
def test_the_reference_catches(broken: Callable[[Tensors, Tensors], Tensors]) -> None:
    toy = toys.toy()
    strict = reference.far(reference.ended(shortening(broken), toy, 40), in_float64(toy, 40, 0.5))
    assert strict > 1e-3
    assert off(shortening(right)) < 1e-5
