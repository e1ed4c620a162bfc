"""clip with quantile: the sign, the bits, the length in use in every half, what noise pays for the count."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.algorithms.fedavg import fedavg
from weft.core import pipeline, trees
from weft.core.buffered import advance
from weft.core.errors import JobError, RunError
from weft.core.failures import Policy
from weft.core.length import KEPT, SHORT, at_length
from weft.core.pipeline import Pipeline
from weft.core.round import Federation
from weft.core.types import At, Link, Order, Parcel, Question, Reply, Server, Site, Tally, Wire
from weft.links import letters, wire
from weft.links.local import Local
from weft.testing import toys
from weft.testing.sound import bits
from weft.testing.transforms import check_transform
from weft.transforms import clip as file
from weft.transforms import noise as noise_file
from weft.transforms.clip import clip, followed, noisy_share
from weft.transforms.delta import delta
from weft.transforms.noise import for_updates, noise
from weft.transforms.quantize import quantize
from weft.transforms.ring import ring
from weft.transforms.topk import topk
from weft.transforms.weigh import weigh
from weft.transforms.zstd import zstd

AT = At(7, 1, "a")


def steps(multiplier: float = 0.0, **keys: Any) -> Pipeline:
    keys = {"norm": 1.0, "quantile": 0.5} | keys
    found = [("delta", delta()), ("clip", clip(**keys)), ("weigh", weigh("uniform"))]
    return [*found, ("noise", noise(multiplier))] if multiplier else found


def tally(clients: int, secret: bytes = b"", number: int = 1) -> Tally:
    names = [str(i) for i in range(clients)]
    return Tally(number, dict.fromkeys(names, 1), dict.fromkeys(names, 1), secret=secret)


def rounds(
    given: Pipeline, count: int, toy: toys.Toy | None = None, server: Server | None = None, through: Any = None
) -> list[tuple[Server, dict[str, Any]]]:
    """Return the server and the journal row after each round of a toy federation."""
    toy, found = toy or toys.toy(), []
    server = server or Server(fedavg().init(toys.adapter()))
    site = toys.ToySite(toy, fedavg(), given)
    for _ in range(count):
        link: Link = through(site) if through else Local([site])
        server, record = advance(server, toy.federation(fedavg(), given), link)
        found.append((server, record))
    return found


# --- one step


def test_a_step_by_hand() -> None:
    """Three of four short, C = 2: C exp(-0.2 (0.75 - 0.5)) = 2 exp(-0.05) = 1.902459; one of four: 2 exp(0.05).

    Andrew et al. 2021 with the quantile 0.9, where all are short: exp(-0.2 (1 - 0.9)) = exp(-0.02) = 0.980199.
    """
    made = clip(2.0, quantile=0.5)
    assert made.adapts is not None
    assert made.adapts.after(3, tally(4)) == (0.75, pytest.approx(1.902459, abs=1e-6))
    assert made.adapts.after(1, tally(4)) == (0.25, pytest.approx(2.102542, abs=1e-6))
    assert followed(1.0, 1.0, 0.9, 0.2) == pytest.approx(0.980199, abs=1e-6)
    assert followed(2.0**-40, 1.0, 0.5, 0.2) == 2.0**-40  # it does not fall to zero


def test_the_bit_says_whether_the_update_stays_as_it_is() -> None:
    """|(3, 4)| = 5: short at 5, too long below; nothing else that a client tells is lost."""
    update = {"adapter": {"w": torch.tensor([3.0, 4.0])}}
    for norm, bit in ((5.0, 1.0), (4.999, 0.0), (50.0, 1.0)):
        parcel = clip(norm, quantile=0.5).client(AT, Parcel(update, 1, metrics={"loss": 2.0}))
        assert parcel.metrics == {"loss": 2.0, SHORT: bit}
        assert trees.norm(trees.flatten(parcel.update)) <= norm
    assert clip(5.0).client(AT, Parcel(update, 1, metrics={"loss": 2.0})).metrics == {"loss": 2.0}


# --- the sign


def settled(norms: Sequence[float], start: float, count: int, rate: float) -> float:
    """Return the length after so many rounds over updates of given norms."""
    length = start
    for _ in range(count):
        made = clip(length, quantile=0.5, rate=rate)
        assert made.adapts is not None
        _, length = made.adapts.after(sum(norm <= length for norm in norms), tally(len(norms)))
    return length


def around_the_median(norms: Sequence[float], length: float, rate: float) -> bool:
    """Tell whether a length is at the median, or within half a step of the largest size around it."""
    room = math.exp(rate / 2)
    return statistics.median_low(norms) / room <= length <= statistics.median_high(norms) * room


NORMS = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@settings(max_examples=25, deadline=None)
@given(NORMS, st.floats(0.01, 100))
def test_the_length_goes_to_the_median(norms: list[float], start: float) -> None:
    """From anywhere: 9.3 powers of e at most, at a share that is off by 1/18 or more, rate 1: 170 rounds and some."""
    assert around_the_median(norms, settled(norms, start, 250, 1.0), 1.0)


def test_the_wrong_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the sign of Flower's update the length runs away, down from 0.1 and up from 5."""
    norms = [0.5, 0.8, 0.855, 1.2, 2.0]
    for start in (0.1, 5.0):
        assert around_the_median(norms, settled(norms, start, 250, 0.2), 0.2)
    monkeypatch.setattr(file, "followed", lambda length, share, middle, rate: followed(length, share, middle, -rate))
    assert settled(norms, 0.1, 60, 0.2) == pytest.approx(0.1 * math.exp(-6))  # 0.00025
    assert settled(norms, 5.0, 60, 0.2) == pytest.approx(5 * math.exp(6))  # 2017


# --- the count's noise, and what it costs


@pytest.mark.parametrize(
    ("multiplier", "spread", "left"),
    [(1.0, 2.5, 1.020621), (2.0, 1.5, 2.683282), (1.0, 50.0, 1.00005), (0.39, 0.2, 1.755137)],
)
def test_what_is_left_for_the_updates_by_hand(multiplier: float, spread: float, left: float) -> None:
    """Both together are z again.

    z = 1, spread 2.5: (1 - 1/25)^-1/2 = 1.020621; z = 2, 1.5: (1/4 - 1/9)^-1/2 = 2.683282;
    z = 1, 50: (1 - 1/10000)^-1/2; z = 0.39, 0.2: (6.574622 - 6.25)^-1/2 = 1.755137.
    """
    found = for_updates(multiplier, Wire(length=1.0, spread=spread))
    assert found == pytest.approx(left, rel=1e-5)
    assert found**-2 + (2 * spread) ** -2 == pytest.approx(multiplier**-2)
    assert pipeline.check(steps(multiplier, spread=spread)).noise == multiplier  # what is accounted for


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_count_without_enough_noise_is_refused(spread: float) -> None:
    with pytest.raises(JobError, match=r"must be more than 0.5; set clip.spread higher"):
        pipeline.check(steps(1.0, spread=spread))


def test_the_noise_of_the_share() -> None:
    """Spread 2 over 10 clients: a deviation of 0.2, to five standard errors of 2000 draws; rounds and counts differ."""
    drawn = [noisy_share(4, 2.0, tally(10, b"secret", number)) - 0.4 for number in range(2000)]
    assert statistics.pstdev(drawn) == pytest.approx(0.2, rel=5 / math.sqrt(4000))
    assert abs(statistics.fmean(drawn)) < 5 * 0.2 / math.sqrt(2000)
    other = noisy_share(5, 2.0, tally(10, b"secret", 1)) - 0.5
    assert len({drawn[1], other, noisy_share(4, 2.0, tally(10, b"other", 1)) - 0.4}) == 3
    assert noisy_share(4, 2.0, tally(10, b"secret", 1)) - 0.4 == drawn[1]  # a repeated round is the same release
    with pytest.raises(RunError, match="no secret"):
        noisy_share(4, 2.0, tally(10))


# --- in rounds


def test_both_halves_and_the_noise_go_by_the_length_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of each round is z_D times that round's length; its three updates are cut to it here and there."""
    scaled: list[float] = []
    cut: list[float] = []
    noisy, shortened = noise_file.noisy, file.shortened
    monkeypatch.setattr(file, "shortened", lambda update, norm: cut.append(norm) or shortened(update, norm))
    seen = lambda total, size, *more: scaled.append(size) or noisy(total, size, *more)  # noqa: E731
    monkeypatch.setattr(noise_file, "noisy", seen)
    played = rounds(steps(0.5, norm=0.5, spread=1.0), 4)
    used = [0.5, *(float(server.beside[KEPT]["norm"]) for server, _ in played)]
    assert len(set(used)) == 5
    assert scaled == pytest.approx([for_updates(0.5, Wire(length=1.0, spread=1.0)) * length for length in used[:-1]])
    assert [row["clip_norm"] for _, row in played] == pytest.approx(used[:-1], rel=1e-5)
    assert cut == [length for length in used[:-1] for _ in range(2 * 3)]
    for (_, row), length, after in zip(played, used, used[1:], strict=False):
        assert after == pytest.approx(length * math.exp(-0.2 * (row["clip_share"] - 0.5)), rel=1e-5)


def test_the_rounds_find_the_median_of_the_updates() -> None:
    """Five clients with updates of given norms, from far below: 0.05 e^(0.5 k) up to 0.5, and slower near 1.5."""
    norms = {"a": 0.5, "b": 0.8, "c": 1.5, "d": 2.0, "e": 4.0}
    played = rounds(steps(norm=0.05, rate=1.0), 22, toys.toy(5), through=lambda site: Local([Given(site, norms)]))
    lengths = [row["clip_norm"] for _, row in played]
    assert 1.5 / math.exp(0.1) <= lengths[-1] <= 1.5 * math.exp(0.1)
    assert lengths[0] == 0.05
    assert {row["clip_share"] for _, row in played[-6:]} == {0.4, 0.6}


@dataclass
class Given:
    """Toy clients whose updates have given norms, whatever they learned."""

    site: toys.ToySite
    norms: dict[str, float]

    def handle(self, order: Order) -> Iterator[Reply]:
        plain = replace(self.site, pipeline=[("delta", delta()), ("weigh", weigh("uniform"))])
        for reply in plain.handle(replace(order, length=None)):
            own = self.norms[reply.client] / trees.norm(trees.flatten(reply.update))
            update = {part: {n: own * v for n, v in tree.items()} for part, tree in reply.update.items()}
            made = at_length(self.site.pipeline, order.length)[1][1].client(AT, Parcel(update, 1))
            yield replace(reply, update=made.update, metrics=made.metrics)

    def answer(self, question: Question) -> Any:
        return self.site.answer(question)


def test_no_bit_is_kept_and_none_is_guessed() -> None:
    """The journal has the share alone; a client that tells no bit, or half of one, is not counted."""

    @dataclass
    class Telling:
        link: Link
        bit: float | None

        def exchange(self, order: Order) -> Iterator[Reply]:
            for reply in self.link.exchange(order):
                told = {name: value for name, value in reply.metrics.items() if name != SHORT}
                yield replace(reply, metrics=told if self.bit is None else told | {SHORT: self.bit})

        def ask(self, question: Question) -> Sequence[Any]:
            return self.link.ask(question)

    toy = toys.toy()
    (_, row), *_ = rounds(steps(spread=1.0), 1)
    assert row["clients"]
    assert not any(SHORT in client for client in row["clients"].values())
    for bit in (None, 0.5, math.nan):
        site = toys.ToySite(toy, fedavg(), steps())
        federation: Federation = toy.federation(fedavg(), steps())
        with pytest.raises(RunError, match="does not say whether its update was short enough for clip"):
            advance(Server(fedavg().init(toys.adapter())), federation, Telling(Local([site]), bit))
    dropping = replace(federation, policy=Policy("drop"))
    lost = toys.Losing(Local([site]), "a", 1, 9)
    server, row = advance(Server(fedavg().init(toys.adapter())), dropping, lost)
    assert any(row["clip_share"] == pytest.approx(short / len(row["clients"]), rel=1e-5) for short in range(4))
    assert "a" not in row["clients"]
    assert KEPT in server.beside


def test_a_round_of_nobody_changes_no_length() -> None:
    toy = toys.toy()
    empty = replace(toy.federation(fedavg(), steps()).sampler, draw=lambda pool: [])
    federation = replace(toy.federation(fedavg(), steps()), sampler=empty)
    before = Server(fedavg().init(toys.adapter()), beside={KEPT: {"norm": torch.tensor([0.3], dtype=torch.float64)}})
    server, row = advance(before, federation, Local([]))
    assert float(server.beside[KEPT]["norm"]) == 0.3
    assert (row["clip_norm"], row["clip_share"]) == (0.3, None)


# --- over real letters


@dataclass
class Posted:
    """A link whose orders and replies are sealed letters, opened again on each side."""

    site: Site
    sent: list[bytes]

    def exchange(self, order: Order) -> Iterator[Reply]:
        fronts, body = letters.order_letters("job", order, {"here": order.clients})
        self.sent.append(fronts["here"] + body)
        tree = letters.opened(letters.answer(self.site, self.sent[-1], "job"), ("replies",), "job")
        for found in tree["replies"]:
            yield letters.reply_of(found, order, order.clients)

    def ask(self, question: Question) -> Sequence[Any]:
        return [self.site.answer(question)]


def test_letters_carry_the_length_and_the_bit() -> None:
    """The same bytes as within one process; without `quantile` no letter has a word of either."""
    sent: list[bytes] = []
    adaptive = steps(0.5, norm=0.5, spread=1.0)
    posted = rounds(adaptive, 3, through=lambda site: Posted(site, sent))
    here = rounds(adaptive, 3)
    assert [bits((s.state, s.beside)) for s, _ in posted] == [bits((s.state, s.beside)) for s, _ in here]
    lengths = [letters.order_of(letters.opened(one, ("order",), "job")).length for one in sent]
    assert lengths == [0.5, *(float(server.beside[KEPT]["norm"]) for server, _ in posted[:-1])]
    sent.clear()
    fixed = [("delta", delta()), ("clip", clip(0.5)), ("weigh", weigh("uniform"))]
    after, row = rounds(fixed, 1, through=lambda site: Posted(site, sent))[0]
    assert "length" not in letters.opened(sent[0], ("order",), "job")
    assert after.beside == {}
    assert "clip_norm" not in row


def test_a_length_that_does_not_fit_is_refused() -> None:
    fixed = [("delta", delta()), ("clip", clip(0.5)), ("weigh", weigh())]
    for given_, length in ((fixed, 1.0), (steps(), None)):
        with pytest.raises(RunError, match="do not agree whether clip adapts"):
            at_length(given_, length)
    for length in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(RunError, match="an order is damaged"):
            at_length(steps(), length)
    order = Order("train", 1, ("a",), {"adapter": toys.adapter()}, {"a": 0}, cohort=("a",), length=0.25)
    fronts, body = letters.order_letters("job", order, {"here": ("a",)})
    assert letters.order_of(wire.unseal(fronts["here"] + body)).length == 0.25
    with pytest.raises(RunError, match="`length` is missing or no float"):
        letters.order_of(wire.unseal(fronts["here"] + body) | {"length": "long"})


# --- what it goes with


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ([delta(), clip(1.0, quantile=0.5), weigh()], "set weigh.by to uniform"),
        ([delta(), weigh(), clip(1.0, quantile=0.5)], "set weigh.by to uniform"),
        ([delta(), clip(1.0, quantile=0.5), clip(1.0)], "stands alone"),
        ([delta(), clip(1.0), clip(1.0, quantile=0.5)], "stands alone"),
        ([delta(), clip(1.0, spread=2.0), weigh()], "set quantile, or leave spread out"),
        ([delta(), clip(1.0, quantile=0.5), weigh("uniform"), ring()], "leave clip.quantile out"),
        ([delta(), quantize(), clip(1.0, quantile=0.5)], "put clip before it"),
        ([clip(1.0, quantile=0.5)], "put delta before clip"),
    ],
)
def test_refused(given_: list[Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        pipeline.check([(str(i), step) for i, step in enumerate(given_)])


@pytest.mark.parametrize("more", [[], [quantize(8)], [topk(0.5, feedback=False)], [topk(0.5), quantize(4), zstd()]])
def test_it_goes_with_what_codes_an_update(more: list[Any]) -> None:
    """The bit stands beside the update, so no step that codes numbers touches it."""
    coded = [*steps(norm=0.5), *((str(i), step) for i, step in enumerate(more))]
    first, second = (row for _, row in rounds(coded, 2))
    plain, _ = (row for _, row in rounds(steps(norm=0.5), 2))
    assert first["clip_share"] == plain["clip_share"]
    assert second["clip_norm"] == pytest.approx(0.5 * math.exp(-0.2 * (first["clip_share"] - 0.5)), rel=1e-5)


def test_it_is_a_transform_like_any_other() -> None:
    check_transform(lambda: clip(1.0, quantile=0.5, spread=1.0), before=(delta, lambda: weigh("uniform")))
