"""The private step: what it promises of noise and sensitivity, each promise with the bugs that it must catch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.site.private_clients import SECRET, cohort, draws, examples, flat, moved, recipe, start, trained
from weft.core import low_rank, trees
from weft.core.task import Example
from weft.site import cohort as engine_file
from weft.site import dpsgd
from weft.site.cohort import Cohort
from weft.site.dpsgd import Draws, Slot, clipped_sums, units_of
from weft.site.optimizers import Optimizer
from weft.site.recipe import Recipe
from weft.site.secret import Secret

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def engine() -> Cohort:
    return cohort()


def rows(engine: Cohort, count: int = 6) -> list[Example]:
    return examples(engine, count)


# --- bugs to plant


def noise_by_root(patch: Patch) -> None:
    right = Draws.noise
    patch.setattr(Draws, "noise", lambda self, count, step: right(self, count, step) / math.sqrt(4))


def actual_batch(patch: Patch) -> None:
    """Take the mean over the batch that was drawn, which tells how many there were."""
    right, seen = dpsgd.clipped_sums, Recipe.expected

    def sums(into: Tensor, slots: list[Slot], *rest: Any) -> Tensor:
        losses = right(into, slots, *rest)
        patch.setattr(Recipe, "expected", lambda self, examples: max(1, len(slots)))
        return losses

    patch.setattr(dpsgd, "clipped_sums", sums)
    patch.setattr(Recipe, "expected", seen)


def no_clip(patch: Patch) -> None:
    patch.setattr(dpsgd, "clipped", lambda sums, clip: sums)


def clip_per_tensor(patch: Patch) -> None:
    right = dpsgd.clipped

    def halves(sums: Tensor, clip: float) -> Tensor:
        return torch.cat([right(part, clip) for part in sums.chunk(2, 1)], 1)

    patch.setattr(dpsgd, "clipped", halves)


def clip_the_sum(patch: Patch) -> None:
    """Clip the mean of a pass, as if it were one example."""
    right = dpsgd.clipped
    patch.setattr(dpsgd, "clipped", lambda sums, clip: right(sums.mean(0, keepdim=True), clip).expand_as(sums))


def same_noise_each_step(patch: Patch) -> None:
    right = Draws.noise
    patch.setattr(Draws, "noise", lambda self, count, step: right(self, count, 0))


def noise_of_a_seed(patch: Patch) -> None:
    patch.setattr(
        Draws,
        "noise",
        lambda self, count, step: torch.randn(count, generator=torch.Generator().manual_seed(3)).double(),
    )


def caught(check: Callable[[Cohort], None], engine: Cohort, plant: Callable[[Patch], None]) -> None:
    """Require that a check fails once a bug is planted."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check(engine)


# --- noise


def check_noise(engine: Cohort) -> None:
    """An empty, a small and a full batch: the released mean is the clipped sum and noise of z C, over the expected.

    13 thousand numbers: their standard deviation is within 2 % of the truth but for one time in a thousand. The sum is
    taken from a second secret's release with the same batch: the difference of two noises has sqrt(2) times the
    standard deviation of one.
    """
    data, clip, noise = {"a": rows(engine, 6)}, 0.3, 2.0
    for batch in ([], [2], list(range(6))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Draws, "sampled", lambda self, units, rate, step, batch=batch: batch)
            one, two = (
                moved(engine, data, given={"a": draws(secret=Secret(bytes([k]) * 32))}, clip=clip, noise=noise)[0]
                for k in (1, 2)
            )
        expected = noise * clip / 4 * math.sqrt(2)
        assert float((one - two).std()) == pytest.approx(expected, rel=0.02)
        if not batch:
            assert float(one.std()) == pytest.approx(noise * clip / 4, rel=0.02)


def test_the_noise_is_that_of_the_job(engine: Cohort) -> None:
    check_noise(engine)


@pytest.mark.parametrize("plant", [noise_by_root, actual_batch])
def test_wrong_noise_is_caught(engine: Cohort, plant: Callable[[Patch], None]) -> None:
    caught(check_noise, engine, plant)


def check_independence(engine: Cohort) -> None:
    """Two steps, two rounds, two clients and two sites have unlike noise: correlations below 5 / sqrt(numbers)."""
    data = {"a": rows(engine, 4), "b": rows(engine, 4)}
    count = flat(start(engine)).shape[1]
    both = moved(engine, data, noise=1e6)
    two_steps = moved(engine, {"a": data["a"]}, noise=1e6, steps=2)
    second = two_steps[0] - moved(engine, {"a": data["a"]}, noise=1e6)[0]
    other = Secret(b"another site's own secret, 32 B.")
    released = [
        both[0],
        both[1],
        second,
        moved(engine, {"a": data["a"]}, noise=1e6, round_=2)[0],
        moved(engine, {"a": data["a"]}, noise=1e6, given={"a": draws(secret=other)})[0],
        moved(engine, {"a": data["a"]}, noise=1e6, given={"a": draws(start_="other")})[0],
    ]
    between = torch.corrcoef(torch.stack(released)) - torch.eye(len(released))
    assert float(between.abs().max()) < 5 / math.sqrt(count)


def test_noise_is_new_for_each_step_round_client_and_site(engine: Cohort) -> None:
    check_independence(engine)


@pytest.mark.parametrize("plant", [same_noise_each_step, noise_of_a_seed])
def test_noise_used_twice_is_caught(engine: Cohort, plant: Callable[[Patch], None]) -> None:
    caught(check_independence, engine, plant)


def test_the_same_address_gives_the_same_bytes(engine: Cohort) -> None:
    """A round that is done again after a crash releases what it released before."""
    data = {"a": rows(engine, 4)}
    assert torch.equal(moved(engine, data), moved(engine, data))


# --- sensitivity


def made(gradients: Tensor, most: int, units: list[int] | None = None) -> Tensor:
    """Return the clipped sum of given example gradients, with clip 1, in passes of `most`."""
    units = units or list(range(len(gradients)))
    slots = [Slot(0, unit, {"ids": torch.zeros(1), "place": i}, 0) for i, unit in enumerate(units)]

    def of(part: list[Slot]) -> tuple[Tensor, Tensor]:
        return gradients[[slot.example["place"] for slot in part]], torch.zeros(len(part))

    into = torch.zeros(1, gradients.shape[1], dtype=torch.float64)
    clipped_sums(into, slots, of, 1.0, most)  # type: ignore[arg-type]
    return into[0]


def check_sensitivity(engine: Cohort | None = None) -> None:
    """Adding or removing any unit moves the sum by at most the clip, however large, small or lopsided it is."""
    draw = torch.Generator().manual_seed(0)
    odd = [torch.zeros(8), torch.full((8,), 1e30), torch.eye(8)[7] * 50, torch.full((8,), 1e-30)]
    bad = torch.full((8,), math.nan)
    gradients = torch.stack([*torch.randn(5, 8, generator=draw), *odd, torch.eye(8)[0] + torch.eye(8)[7], bad])
    units = [0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    for by in (None, units):
        for most in (1, 2, 3, 20):
            numbers = torch.tensor(by or list(range(len(gradients))))
            whole = made(gradients, most, by)
            assert whole.isfinite().all()
            for unit in numbers.unique().tolist():
                left = made(gradients[numbers != unit], most, numbers[numbers != unit].tolist())
                assert float((whole - left).norm()) <= 1 + 1e-9


def test_one_unit_moves_the_sum_by_the_clip_at_most() -> None:
    check_sensitivity()


@pytest.mark.parametrize("plant", [no_clip, clip_per_tensor])
def test_a_wrong_clip_is_caught(engine: Cohort, plant: Callable[[Patch], None]) -> None:
    """Clipped by halves, a unit with norm in both moves the sum by sqrt(2)."""
    caught(check_sensitivity, engine, plant)


def test_clipping_by_hand() -> None:
    """[3, 4] has norm 5 and becomes [0.6, 0.8]; [0.3, 0.4] stays: the sum is [0.9, 1.2].

    As one unit they are [3.3, 4.4], of norm 5.5, and become [0.6, 0.8].
    """
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    for most in (1, 2):
        assert made(gradients, most).tolist() == pytest.approx([0.9, 1.2])
        assert made(gradients, most, [0, 0]).tolist() == pytest.approx([0.6, 0.8])


def check_records(engine: Cohort) -> None:
    """On the model: with any record left out, the noiseless sum of a full batch moves by the clip at most."""
    data, clip = rows(engine, 5), 0.02
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "sampled", lambda self, units, rate, step: list(range(units)))
        patch.setattr(Recipe, "expected", lambda self, examples: 1)
        whole = moved(engine, {"a": data}, clip=clip, noise=0.0)
        for i in range(len(data)):
            left = moved(engine, {"a": data[:i] + data[i + 1 :]}, clip=clip, noise=0.0)
            assert float((whole - left).norm()) <= clip * (1 + 1e-6)
            assert float((whole - left).norm()) > 0.9 * clip  # these gradients are larger than the clip


def test_one_record_moves_a_step_by_the_clip_at_most(engine: Cohort) -> None:
    check_records(engine)


@pytest.mark.parametrize("plant", [no_clip, clip_per_tensor, clip_the_sum])
def test_a_wrong_clip_of_the_step_is_caught(engine: Cohort, plant: Callable[[Patch], None]) -> None:
    caught(check_records, engine, plant)


def test_all_records_of_a_unit_count_as_one(engine: Cohort) -> None:
    """Three records of one patient are drawn together and move the sum by one clip, in whatever passes they come."""
    data = rows(engine, 5)
    for i, unit in enumerate([0, 1, 1, 1, 2]):
        data[i][dpsgd.UNIT] = unit
    assert units_of(data) == [[0], [1, 2, 3], [4]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "expected", lambda self, examples: 1)
        for tokens in (1, 10_000):
            patch.setitem(engine_file.TOKENS, "cpu", tokens)
            patch.setattr(Draws, "sampled", lambda self, units, rate, step: list(range(units)))
            whole = moved(engine, {"a": data}, clip=0.02, noise=0.0)
            left = moved(engine, {"a": [data[0], data[4]]}, clip=0.02, noise=0.0)
            assert float((whole - left).norm()) == pytest.approx(0.02, rel=1e-5)


# --- sampling


def test_batches_are_drawn_by_chance() -> None:
    """4000 steps of 40 units at 0.1: sizes are binomial (chi-square), no unit is drawn more than chance allows."""
    taken = [draws().sampled(40, 0.1, step) for step in range(4000)]
    sizes = torch.bincount(torch.tensor([min(len(step), 9) for step in taken]), minlength=10)
    chances = [*stats.binom.pmf(range(9), 40, 0.1), stats.binom.sf(8, 40, 0.1)]
    assert stats.chisquare(sizes.tolist(), [4000 * p for p in chances]).pvalue > 1e-3
    often = torch.bincount(torch.tensor([unit for step in taken for unit in step]), minlength=40)
    assert stats.chisquare(often.tolist()).pvalue > 1e-3


def test_a_unit_more_changes_no_other_ones_chance() -> None:
    """Each unit is drawn whatever the others are: with one more, the same of the first forty are in the batch."""
    assert [u for u in draws().sampled(41, 0.3, 1) if u < 40] == draws().sampled(40, 0.3, 1)


def test_no_step_is_left_out(engine: Cohort) -> None:
    """Six records by two are three steps, whatever is drawn; a batch as large as the data takes every record."""
    data = {"a": rows(engine, 6)}
    for batch, steps in ((2, 3), (6, 1), (60, 1)):
        lane = Cohort(engine.loaded, engine.task, recipe(batch=batch, steps=None), 3, "padded", engine.lift)._lane(
            0, "a", data["a"], 1, draws()
        )
        assert len(lane.order) == steps
        assert batch < 6 or lane.order == [[0, 1, 2, 3, 4, 5]]


# --- blocks


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_a_block_equals_its_clients_one_by_one(mode: Any, optimizer: str) -> None:
    """Unlike lengths and numbers of steps, dropout, a schedule, weight decay; passes of few tokens as well."""
    engine = cohort("lora", mode=mode, dropout=0.2)
    data = {"a": rows(engine, 7), "b": rows(engine, 4), "c": rows(engine, 5)}
    keys: dict[str, Any] = {"optimizer": optimizer, "lr": 0.01, "batch": 2, "steps": None, "epochs": 2, "noise": 0.3}
    keys |= {"schedule": "cosine", "warmup": 0.05, "weight_decay": 0.1}
    first = start(engine, 3)
    together = trained(engine, data, **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_file.TOKENS, "cpu", 80)
        small = trained(engine, data, **keys)
    assert float((flat(together) - flat(small)).abs().max()) < 1e-7
    for k, name in enumerate(data):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "tests.site.private_clients.start", lambda *_, k=k: {n: v[k : k + 1] for n, v in first.items()}
            )
            alone = trained(engine, {name: data[name]}, **keys)
        assert float((flat(together)[k] - flat(alone)[0]).abs().max()) < 1e-7
        assert float((flat(first)[k] - flat(alone)[0]).abs().max()) > 1e-3


def test_out_of_memory_halves_the_pass(engine: Cohort, monkeypatch: Patch) -> None:
    data = {"a": rows(engine, 6)}
    monkeypatch.setattr(Draws, "sampled", lambda self, units, rate, step: list(range(units)))
    expected, real = moved(engine, data), Cohort.losses

    def failing(self: Cohort, params: Any, given: Any, *rest: Any) -> Any:
        if len(given) > 2:
            raise torch.OutOfMemoryError("planted")
        return real(self, params, given, *rest)

    monkeypatch.setattr(Cohort, "losses", failing)
    assert float((moved(engine, data) - expected).abs().max()) < 1e-9


def test_what_rests_is_neither_clipped_nor_noised(engine: Cohort) -> None:
    """With A at rest, as in ffa_lora, the whole clip is B's, where both factors would share it."""
    data = {"a": rows(engine, 1)}
    resting = low_rank.resting(lambda name: low_rank.A in name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "sampled", lambda self, units, rate, step: [0])
        whole = trees.subtract(start(engine), trained(engine, data, noise=0.0, clip=0.01))
        only = trees.subtract(start(engine), trained(engine, data, noise=0.0, clip=0.01, gradient=resting))
        noised = trees.subtract(start(engine), trained(engine, data, noise=1.0, gradient=resting))

    def factor(tree: Any, mark: str) -> float:
        return trees.norm({name: value for name, value in tree.items() if mark in name})

    assert factor(only, low_rank.A) == factor(noised, low_rank.A) == 0 < factor(noised, low_rank.B)
    assert factor(only, low_rank.B) == pytest.approx(0.01, rel=1e-4)
    assert factor(whole, low_rank.B) < 0.0099


def test_corrections_come_after_the_noise(engine: Cohort) -> None:
    """A proximal pull is added to the noised gradient, so it can carry nothing of a record past the clip."""
    data, seen = {"a": rows(engine, 4)}, []

    def gradient(grads: Any, params: Any, rows: Tensor) -> Any:
        seen.append(flat(grads))
        return grads

    plain = moved(engine, data, gradient=gradient)
    assert torch.allclose(plain, seen[0], atol=1e-9)


def test_momentum_goes_on_from_noised_gradients(engine: Cohort) -> None:
    """Two steps of sgd with momentum from two releases g1, g2: w moves by g1 + (0.5 g1 + g2)."""
    data, seen = {"a": rows(engine, 4)}, []

    def gradient(grads: Any, params: Any, rows: Tensor) -> Any:
        seen.append(flat(grads)[0].clone())
        return grads

    gone = moved(engine, data, gradient=gradient, momentum=0.5, steps=2)[0]
    assert torch.allclose(gone, 1.5 * seen[0] + seen[1], atol=1e-9)
    assert Optimizer("sgd", 0.0, 0.5).momentum == 0.5
    assert SECRET.name != Secret(bytes(32)).name
