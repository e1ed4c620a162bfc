"""Epsilon against published values, closed forms and a second accountant."""

import math
from collections.abc import Sequence

import pytest
from scipy import optimize, special, stats

from weft.core.errors import JobError
from weft.privacy import Spent, added, epsilon, worst

MNIST = 256 / 60_000
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64))


def of(noise: float, rate: float, steps: int, delta: float = 1e-5) -> tuple[float, float]:
    found = epsilon((Spent(noise, rate, steps),), delta)
    assert found.pld is not None
    return found.pld, found.rdp


def classic(noise: float, rate: float, steps: int, delta: float, orders: Sequence[float] = ORDERS) -> float:
    """Return the epsilon of the first papers and tutorials: min over orders a of RDP(a) + log(1/delta) / (a - 1)."""
    import dp_accounting
    from dp_accounting import rdp

    found = rdp.RdpAccountant(orders=orders)
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    found.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    return float(min(r + math.log(1 / delta) / (a - 1) for a, r in zip(found._orders, found._rdp, strict=True)))


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "published"),
    [
        (1.12, MNIST, 60 * 234, 1e-5, 2.92),  # tensorflow/privacy tutorials/README.md
        (0.6, MNIST, 30 * 234, 1e-5, 9.75),  # 9.74 there, 9.754 here: the number of steps of an epoch is rounded
        (1.2, MNIST, 10 * 234, 1e-5, 1.20),
        (1.1, MNIST, 60 * 234, 1e-5, 3.01),  # pytorch/opacus examples/mnist_README.md
        (0.7, MNIST, 45 * 234, 1e-5, 7.10),
        (1.3, MNIST, 15 * 234, 1e-5, 1.19),
        (1.3, 0.004, 250, 1e-5, 0.711),
        (4.0, 0.01, 10_000, 1e-5, 1.26),  # Abadi et al. 2016, section 3.2
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_published_values(noise: float, rate: float, steps: int, delta: float, published: float) -> None:
    """To three digits, with the conversion of their time; both of ours are tighter, and PLD the tightest."""
    digits = 2 - math.floor(math.log10(published))
    assert round(classic(noise, rate, steps, delta), digits) == published
    tight, loose = of(noise, rate, steps, delta)
    assert tight < loose < published


def test_federated_averaging_of_mcmahan() -> None:
    """763,430 users, 5,000 expected a round, noise 1, 5,000 rounds, delta 1e-9: 4.634, by integer orders to 32."""
    assert round(classic(1.0, 5000 / 763_430, 5000, 1e-9, range(2, 33)), 3) == 4.634


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "by_pld", "by_rdp"),
    [
        (1.0, 0.01, 1000, 1e-5, 1.83, 2.10),  # opacus: PRV 1.829, RDP 2.101
        (1.0, 0.1, 100, 1e-5, 7.05, 7.90),
        (2.0, 1.0, 20, 1e-5, 11.48, 12.30),  # twenty rounds of every site; 12.30 in dp-accounting's own notes
        (1.0, 64 / 5000, 235, 5000**-1.1, 1.00, 1.32),  # 5,000 records by 64, three epochs
        (0.7, 128 / 20_000, 469, 20_000**-1.1, 2.30, 3.04),
    ],
)
def test_both_accountants(noise: float, rate: float, steps: int, delta: float, by_pld: float, by_rdp: float) -> None:
    tight, loose = of(noise, rate, steps, delta)
    assert tight == pytest.approx(by_pld, rel=5e-3)
    assert loose == pytest.approx(by_rdp, rel=5e-3)


def gaussian(noise: float, steps: int, delta: float) -> float:
    """Return the exact epsilon (Balle and Wang 2018, theorem 8); T Gaussian mechanisms are one of z / sqrt(T).

    delta = Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m) with m = sqrt(T) / z.
    """
    mu = math.sqrt(steps) / noise

    def excess(eps: float) -> float:
        return float(stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu)) - delta)

    return float(optimize.brentq(excess, 0, 1000))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 20), (4.0, 10), (8.0, 30), (0.7, 3)])
def test_without_sampling_it_is_the_exact_value(noise: float, steps: int) -> None:
    """PLD rounds up: never below the exact value, and above it by less than one in a hundred."""
    exact, (tight, _) = gaussian(noise, steps, 1e-5), of(noise, 1.0, steps)
    assert exact <= tight < 1.01 * exact


def by_hand(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return RDP's epsilon from its closed form at integer orders (Mironov et al. 2019, arXiv:1908.10530, eq. 30).

    RDP(a) = log sum_k C(a,k) (1-q)^(a-k) q^k exp((k^2-k)/(2 z^2)) / (a-1), and
    epsilon = RDP(a) + log((a-1)/a) - (log delta + log a) / (a-1).
    """
    found = []
    for a in range(2, 64):
        terms = [
            math.log(math.comb(a, k)) + (a - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / 2 / noise**2
            for k in range(a + 1)
        ]
        rdp = steps * float(special.logsumexp(terms)) / (a - 1)
        found.append(rdp + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1))
    return min(found)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.01, 1000), (2.0, 0.1, 200), (4.0, 0.3, 50)])
def test_rdp_is_its_closed_form(noise: float, rate: float, steps: int) -> None:
    assert of(noise, rate, steps)[1] == pytest.approx(by_hand(noise, rate, steps, 1e-5), rel=1e-2)


def test_it_moves_the_right_way() -> None:
    """More noise, less sampling, fewer steps and a larger delta each spend less; RDP is never below PLD."""
    base = of(1.0, 0.05, 100)
    for less in (of(1.1, 0.05, 100), of(1.0, 0.04, 100), of(1.0, 0.05, 90), of(1.0, 0.05, 100, 1e-4)):
        assert less[0] < base[0]
        assert less[1] < base[1]
    assert base[0] < base[1]


def test_composition_adds_steps_up() -> None:
    """Two rounds of 30 steps are 60 steps; unlike rounds spend more than the larger and less than twice it."""
    halves = added([Spent(1.0, 0.05, 30), Spent(1.0, 0.05, 30)])
    assert halves == (Spent(1.0, 0.05, 60),)
    mixed = epsilon(added([Spent(1.0, 0.05, 30), Spent(2.0, 0.05, 30)]), 1e-5)
    assert epsilon((Spent(1.0, 0.05, 30),), 1e-5).value < mixed.value < epsilon(halves, 1e-5).value


def test_nothing_spent_and_no_noise() -> None:
    assert epsilon((), 1e-5).value == 0
    assert epsilon((Spent(0.0, 0.1, 1),), 1e-5).value == math.inf


def test_a_huge_epsilon_is_told_by_rdp_alone() -> None:
    found = epsilon((Spent(0.1, 1.0, 1000),), 1e-5)
    assert found.pld is None
    assert found.accountant == "RDP"
    assert found.value > 100


def test_only_what_may_be_the_worst_is_looked_at() -> None:
    many = [(Spent(1.0, rate / 100, steps),) for rate in range(1, 50) for steps in range(1, 5)]
    assert worst(many) == [(Spent(1.0, 0.49, 4),)]
    crossed = [(Spent(1.0, 0.5, 2),), (Spent(1.0, 0.1, 20),), (Spent(1.0, 0.1, 2),)]
    assert worst(crossed) == crossed[:2]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(JobError, match=r"pip install 'weft-fl\[privacy\]'"):
        epsilon((Spent(1.2345, 0.5, 2),), 1e-5)
