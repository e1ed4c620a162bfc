"""The ring: its bits by hand, sums at the bounds against big integers, wrong sums refused."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.errors import RunError
from weft.core.ring import FIELDS, Code, RingSum, code, encode, size
from weft.core.types import State, Wire
from weft.testing.sound import bits


def state(*numbers: float) -> State:
    return {"adapter": {"w": torch.tensor(numbers)}}


def test_bits_by_hand() -> None:
    """N (C 2^f + 1) < 2^31: for n = 10, C = 1 2^27 fits (10 * 134,217,729 < 2,147,483,648) and 2^28 does not;
    for n = 3, C = 0.5 2^30 fits (3 * 536,870,913) and 2^31 does not.
    """
    assert (Code(10, 1.0).bits, Code(3, 0.5).bits, Code(100, 1.0).bits, Code(1, 1024.0).bits) == (27, 30, 24, 20)


@given(st.integers(1, 3000), st.floats(1e-6, 1e6))
def test_bits_are_as_many_as_fit(clients: int, norm: float) -> None:
    f = Code(clients, norm).bits
    assert clients * (Fraction(norm) * Fraction(2) ** f + 1) < 2**31
    assert clients * (Fraction(norm) * Fraction(2) ** (f + 1) + 1) >= 2**31


def test_noise_has_room() -> None:
    """N = 10, C = 1, noise 2: 10 + 24 * 2 = 58 units of 2^f below 2^31: f = 25."""
    assert Code(10, 1.0, 1, 2.0).bits == 25
    assert code(Wire(norm=1.0, heaviest=7, noise=2.0), 10) == Code(10, 1.0, 7, 2.0)


def test_a_mean_by_hand() -> None:
    """Weights 1 and 3 of at most 4, C = 8, n = 2: the unit is 2^26. (1 * 2 + 3 * 6) / 4 = 5, (1 * 1 - 3 * 1) / 4 is
    -0.5; losses 2 and 4 weigh (1 * 2 + 3 * 4) / 4 = 3.5.
    """
    known = Code(2, 8.0, 4)
    assert known.unit == 2.0**26
    total = RingSum(known, state(0.0, 0.0))
    for update, weight, loss in ((state(2.0, 1.0), 1, 2.0), (state(6.0, -1.0), 3, 4.0)):
        total.add({"ring": {"vector": encode(update, weight, loss, known)}}, 1)
    assert total.divided()["adapter"]["w"].tolist() == [5.0, -0.5]
    assert (total.weight, total.loss) == (4, 3.5)


def test_nobody_tells_a_loss() -> None:
    total = RingSum(Code(2, 1.0), state(0.0))
    total.add({"ring": {"vector": encode(state(0.5), 1, None, total.code)}}, 1)
    assert total.loss is None
    total = RingSum(Code(2, 1.0), state(0.0))
    total.add({"ring": {"vector": encode(state(0.5), 1, 1e9, total.code)}}, 1)
    assert total.loss == 63.0


@settings(max_examples=60)
@given(st.integers(1, 40), st.lists(st.sampled_from([-1, 1]), min_size=1, max_size=6), st.sampled_from([1, 3, 1000]))
def test_sums_at_the_bound_are_those_of_big_integers(clients: int, signs: list[int], most: int) -> None:
    """Every coordinate of every client at +-C, which no joint norm would allow: the ring has room all the same."""
    known = Code(clients, 0.7, most)
    each = [sign * round(known.unit * 0.7) for sign in signs]
    vector = torch.tensor([*each, most, 0], dtype=torch.int64).to(torch.int32)
    total = RingSum(known, {"adapter": {"w": torch.zeros(len(signs))}})
    for _ in range(clients):
        total.add({"ring": {"vector": vector}}, 1)
    assert total.vector.tolist() == [clients * number for number in each] + [clients * most, 0]
    assert all(abs(clients * number) < 2**31 for number in each)


def test_addition_wraps_around() -> None:
    """2^31 - 1 + 5 = -2^31 + 4 mod 2^32, in vectors of every length that one instruction may add."""
    for length in range(1, 70):
        total = RingSum(Code(9, 1.0), {"adapter": {"w": torch.zeros(length)}})
        for number in (2**31 - 1, 5):
            total.add({"ring": {"vector": torch.full((length + FIELDS,), number, dtype=torch.int32)}}, 1)
        assert total.vector.unique().tolist() == [-(2**31) + 4]


def test_rounding_is_to_the_nearest_unit() -> None:
    known = Code(10, 1.0)
    update = torch.tensor([0.3, -0.3, 1e-9, 0.1])
    got = encode({"adapter": {"w": update}}, 1, None, known)[:-FIELDS].double() / known.unit
    assert float((got - update.double()).abs().max()) <= 0.5 / known.unit
    assert (size(state(1.0, 2.0)), known.unit) == (4, 2.0**27)


def test_with_noise_the_integers_are_no_longer_than_the_norm() -> None:
    """Rounding lengthens a vector of many equal numbers; 20,000 of them, seen from the ring, stay within C 2^f."""
    draw = torch.Generator().manual_seed(1)
    update = torch.randn(20_000, generator=draw)
    update = (update.double() / update.double().norm() * 0.999999).float()
    known = Code(3000, 1.0, 1, 8.0)
    assert float(encode({"a": {"w": update}}, 1, None, known)[:-FIELDS].double().norm()) <= known.unit
    rounded = (update.double() * known.unit * 1.0000009).round()
    assert float(rounded.norm()) > known.unit  # negative control: rounding alone is longer


@pytest.mark.parametrize(
    ("update", "weight", "words"),
    [
        (state(float("nan")), 1, "adapter/w holds a NaN"),
        (state(float("-inf")), 1, "adapter/w holds a NaN or an infinity"),
        (state(0.8, 0.8), 1, "an update of length 1.13137 is longer than clip allows, 1"),
        (state(0.5), 0, "a weight is from 1 to 4"),
        (state(0.5), 5, "a weight is from 1 to 4"),
    ],
)
def test_what_does_not_fit_is_refused(update: State, weight: int, words: str) -> None:
    with pytest.raises(RunError, match=words):
        encode(update, weight, None, Code(3, 1.0, 4))


def ringed(*vectors: list[int], norm: float = 1.0) -> RingSum:
    total = RingSum(Code(3, norm, 4), state(0.0, 0.0))
    for vector in vectors:
        total.add({"ring": {"vector": torch.tensor(vector, dtype=torch.int32)}}, 1)
    return total


@pytest.mark.parametrize(
    "vector",
    [
        [2**30, 0, 1, 0],  # one number above C 2^f = 2^29
        [2**29 - 9, 2**29 - 9, 1, 0],  # each within, together too long
        [0, 0, 0, 0],
        [0, 0, 5, 0],  # a weight above the cap
        [0, 0, -1, 0],
        [0, 0, 1, -1],
        [0, 0, 1, 2**31 - 1],
    ],
)
def test_a_sum_out_of_its_bounds_is_refused(vector: list[int]) -> None:
    assert ringed([2**29 - 9, 0, 1, 0]).divided()["adapter"]["w"][1] == 0
    with pytest.raises(RunError, match="a mask is left on it"):
        ringed(vector).divided()


def test_a_mask_that_is_left_on_is_found_at_every_size() -> None:
    """Uniform numbers have length 2^31 sqrt(d / 3); the bounds are far below, with and without noise."""
    draw = torch.Generator().manual_seed(3)
    for length in (2, 100, 10_000):
        for noise in (0.0, 4.0):
            total = RingSum(Code(3, 1.0, 4, noise), {"adapter": {"w": torch.zeros(length)}})
            numbers = torch.randint(-(2**31), 2**31, (length + FIELDS,), generator=draw)
            numbers[-FIELDS:] = torch.tensor([3, 0])
            for _ in range(3):
                total.add({"ring": {"vector": torch.zeros(length + FIELDS, dtype=torch.int32)}}, 1)
            total.vector.copy_(numbers.to(torch.int32))
            if length > 2 or not noise:
                with pytest.raises(RunError, match="a mask is left on it"):
                    total.check()


def test_a_ring_takes_no_more_clients_than_it_has_room_for() -> None:
    with pytest.raises(RunError, match="a ring has room for the vectors of 3 clients"):
        ringed(*[[0, 0, 1, 0]] * 4)


def test_parts_and_names_come_back_in_order_and_shape() -> None:
    update: State = {
        "b": {"y": torch.tensor([[0.25, 0.5]]), "x": torch.tensor(0.125)},
        "a": {"z": torch.tensor([-0.25])},
    }
    total = RingSum(Code(3, 1.0), update)
    total.add({"ring": {"vector": encode(update, 1, None, total.code)}}, 1)
    expected = {"a": update["a"], "b": {"x": update["b"]["x"], "y": update["b"]["y"]}}
    assert bits(total.divided()) == bits(expected)
    assert [list(tree) for tree in total.divided().values()] == [["z"], ["x", "y"]]


def test_the_order_of_the_clients_changes_no_bit() -> None:
    draw = torch.Generator().manual_seed(2)
    updates = [{"a": {"w": torch.randn(50, generator=draw) / 20}} for _ in range(9)]
    known, results = Code(9, 1.0, 9), []
    for order in (range(9), reversed(range(9))):
        total = RingSum(known, updates[0])
        for i in order:
            total.add({"ring": {"vector": encode(updates[i], i + 1, 1.0, known)}}, 1)
        results.append(bits(total.divided()))
    assert results[0] == results[1]
    exact = sum(((i + 1) * row["a"]["w"].double() for i, row in enumerate(updates)), torch.zeros(50).double()) / 45
    error = (total.divided()["a"]["w"].double() - exact).abs().max()
    assert float(error) <= math.sqrt(9) * 9 / (45 * known.unit) + 2**-25
