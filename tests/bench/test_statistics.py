"""The e-process against numerical integration of its definition, and the verdicts against simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from counterproof.bench.statistics import (
    assess,
    confidence_sequence,
    e_bh,
    e_value,
    paired_effects,
    seeds_needed,
    t_interval,
)

EFFECTS = st.lists(st.floats(-100, 100).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=12)


def integrated_e_value(x, k=0.3):
    """The Bayes factor by definition: right Haar prior on the scale, N(0, 1/k) on the standardised effect."""
    x = np.asarray(x) / np.abs(x).max()

    def marginal(delta):
        def density(log_sigma):
            sigma = math.exp(log_sigma)
            return math.exp(float(np.sum(stats.norm.logpdf(x, delta * sigma, sigma))))

        return integrate.quad(density, -8, 8, limit=400, points=[-2, 0, 2])[0]

    prior = stats.norm(0, 1 / math.sqrt(k))
    nodes = np.linspace(-10, 10, 121)
    mixed = integrate.simpson([marginal(d) * prior.pdf(d) for d in nodes], x=nodes)
    return mixed / marginal(0.0)


@pytest.mark.parametrize("x", [[0.5, 1.5], [1.0, 2.0, 1.2], [0.3, -0.4, 0.9, 0.1, 0.6]])
def test_e_value_is_the_bayes_factor_it_is_defined_as(x):
    assert e_value(x) == pytest.approx(integrated_e_value(x), rel=1e-3)


def test_e_value_by_hand():
    """n = 2, x = (1, 3): S = 4, V = 10, k = .3; sqrt(.3/2.3) * (10 / (10 - 16/2.3))^1 = .36116 * 3.28571."""
    assert e_value([1.0, 3.0]) == pytest.approx(math.sqrt(0.3 / 2.3) * 10 / (10 - 16 / 2.3))


def test_equal_effects_are_strong_evidence_and_a_float():
    assert e_value([2.0] * 4) == pytest.approx((4.3 / 0.3) ** 1.5)
    assert 1e300 < e_value([2.0] * 2000) < math.inf


def test_one_effect_or_none_is_no_evidence():
    assert e_value([]) == e_value([5.0]) == 1.0
    assert e_value([0.0, 0.0, 0.0]) == 1.0


@given(EFFECTS, st.floats(0.01, 100))
def test_e_value_ignores_scale_sign_and_order(x, factor):
    assert e_value(x) == pytest.approx(e_value([factor * v for v in x]), rel=1e-6)
    assert e_value(x) == pytest.approx(e_value([-v for v in x]), rel=1e-9)
    assert e_value(x) == pytest.approx(e_value(x[::-1]), rel=1e-9)


@given(EFFECTS)
def test_confidence_sequence_ends_where_the_e_value_reaches_its_bound(x):
    low, high = confidence_sequence(x)
    if math.isfinite(low) and high - low > 1e-6:
        assert e_value(x, low) == pytest.approx(20, rel=1e-3)
        assert e_value(x, high) == pytest.approx(20, rel=1e-3)
        assert e_value(x, (low + high) / 2) < 20


def test_fewer_than_four_seeds_bound_nothing_at_95_percent():
    x = [1.0, 1.1, 0.9, 1.05]
    assert confidence_sequence(x[:3]) == (-math.inf, math.inf)
    assert all(map(math.isfinite, confidence_sequence(x)))


def test_t_interval_is_the_usual_one():
    x = np.random.default_rng(1).normal(2, 3, 9)
    usual = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert t_interval(x) == pytest.approx((usual.low, usual.high))


def first_rejection(x, null=0.0, most=30):
    return next((n for n in range(2, most + 1) if e_value(x[:n], null) >= 20), None)


def test_peeking_after_every_seed_is_wrong_at_most_five_percent_of_the_time():
    """2.4 % with seeds 2 to 30 by the design's simulation; 5 % is the guarantee."""
    rng = np.random.default_rng(0)
    wrong = sum(first_rejection(rng.normal(0, 1, 30)) is not None for _ in range(3000)) / 3000
    assert 0.012 < wrong < 0.035


def test_confidence_sequence_covers_at_all_times_at_once():
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(1000):
        x = rng.normal(0.7, 2, 25)
        bounds = [confidence_sequence(x[:n]) for n in range(2, 26)]
        missed += not all(low <= 0.7 <= high for low, high in bounds)
    assert missed / 1000 < 0.05


def test_power_is_what_the_design_says():
    rng = np.random.default_rng(3)
    medians = [
        np.median([first_rejection(rng.normal(d, 1, 40), most=40) or 40 for _ in range(400)]) for d in (1, 2, 3, 5)
    ]
    assert medians == pytest.approx([12, 6, 5, 4], abs=1)


def test_the_verdict_under_peeking_errs_at_most_five_percent_of_the_time_with_a_smallest_effect():
    """A true effect just at the smallest that matters must not be called by peeking."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(600):
        pairs = [(0.0, v) for v in rng.normal(0.5, 1, 20)]
        wrong += any(
            assess(pairs[:n], better="higher", effect="difference", smallest=0.5).verdict in ("holds", "absent")
            for n in range(2, 21)
        )
    assert wrong / 600 < 0.05


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=7), st.floats(0.01, 0.5))
@settings(max_examples=60)
def test_e_bh_is_the_largest_self_consistent_set(values, alpha):
    kept = e_bh(values, alpha)
    count = len(values)

    def consistent(chosen):
        return all(values[i] * alpha * len(chosen) >= count for i in chosen)

    best = max(
        (len(c) for r in range(count + 1) for c in itertools.combinations(range(count), r) if consistent(c)), default=0
    )
    assert sum(kept) == best
    assert consistent([i for i in range(count) if kept[i]])


def test_e_bh_bounds_false_discoveries():
    rng = np.random.default_rng(5)
    shares = []
    for _ in range(300):
        x = rng.normal([[0.0]] * 15 + [[1.5]] * 5, 1, (20, 12))
        kept = e_bh([max(e_value(row), 0) for row in x])
        false = sum(kept[:15])
        shares.append(false / max(1, sum(kept)))
    assert np.mean(shares) < 0.05


def test_effects_are_improvements():
    pairs = [(2.0, 1.0), (4.0, 1.0)]
    assert paired_effects(pairs, "lower", "difference") == [1.0, 3.0]
    assert paired_effects(pairs, "higher", "difference") == [-1.0, -3.0]
    assert paired_effects(pairs, "lower", "ratio") == pytest.approx([math.log(2), math.log(4)])


def test_a_failed_trial_counts_against_its_arm():
    pairs = [(1.0, 2.0), (1.0, 4.0), (1.0, None), (None, 1.0), (None, None)]
    assert paired_effects(pairs, "higher", "difference") == [1.0, 3.0, -3.0, 3.0, 0.0]
    assert paired_effects([(None, None), (None, 1.0)], "higher", "difference") == []


def test_a_ratio_of_nothing_is_refused():
    with pytest.raises(ValueError, match="positive"):
        paired_effects([(0.0, 1.0)], "lower", "ratio")


STEADY = [0.0, 0.1, -0.1, 0.05, 0.02, -0.04, 0.08, -0.06]


@pytest.mark.parametrize(
    ("gain", "smallest", "verdict"),
    [
        (1.0, None, "holds"),
        (1.0, 0.5, "holds"),
        (1.0, 1.0, "open"),
        (1.0, 2.0, "absent"),
        (0.0, 0.5, "absent"),
        (0.0, None, "open"),
        (-1.0, None, "reversed"),
        (-1.0, 0.5, "reversed"),
    ],
)
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_verdicts(gain, smallest, verdict, better):
    sign = 1 if better == "higher" else -1
    found = assess(
        [(5.0, 5.0 + sign * (gain + v)) for v in STEADY], better=better, effect="difference", smallest=smallest
    )
    assert found.verdict == verdict
    assert found.effect == pytest.approx(sign * (gain + np.mean(STEADY)))
    assert found.interval[0] < found.effect < found.interval[1]
    if verdict != "open":
        assert found.e_value >= 20


def test_ratio_verdict_speaks_in_factors():
    pairs = [(10.0, 5.0), (8.0, 4.2), (12.0, 5.9), (9.0, 4.4), (11.0, 5.6)]
    found = assess(pairs, better="lower", effect="ratio", smallest=0.9)
    assert found.verdict == "holds"
    assert found.effect == pytest.approx(stats.gmean([m / b for b, m in pairs]))
    assert 0 < found.interval[0] < found.effect < found.interval[1] < 0.9
    assert found.leave_one_out[0] < found.effect < found.leave_one_out[1]
    assert found.correlation == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1])
    assert found.wins == 5


def test_failures_are_shown_and_weigh():
    good = [(0.0, 1.0 + v) for v in STEADY]
    found = assess([*good, (0.0, None)], better="higher", effect="difference")
    assert found.failed == (0, 1)
    assert found.finished_only == pytest.approx(1.0 + np.mean(STEADY))
    assert found.effect < found.finished_only
    nothing = assess([(None, None)] * 4, better="higher", effect="difference")
    assert nothing.verdict == "open"
    assert nothing.effect is None


def test_identical_arms_are_absent_or_open():
    same = [(v, v) for v in STEADY]
    assert assess(same, better="higher", effect="difference", smallest=0.1).verdict == "absent"
    assert assess(same, better="higher", effect="difference").verdict == "open"


def test_a_very_wide_interval_of_a_ratio_stays_a_number():
    found = assess([(1e-200, 1e200), (1e200, 1e-200), (1.0, 2.0), (2.0, 1.0)], better="lower", effect="ratio")
    assert found.interval[0] >= 0
    assert found.interval[1] > 1


def test_the_scale_of_the_metric_does_not_matter():
    x = np.random.default_rng(8).normal(1, 1, 6)
    for scale in (1e-300, 1e300):
        assert np.array(confidence_sequence(x * scale)) / scale == pytest.approx(confidence_sequence(x))
        assert np.array(t_interval(x * scale)) / scale == pytest.approx(t_interval(x))
        assert seeds_needed(x * scale, scale) == seeds_needed(x, 1.0)


def test_seeds_needed_settles_at_the_same_mean_and_spread():
    x = np.random.default_rng(6).normal(0.4, 1, 6)
    needed = seeds_needed(x)
    mean, sd = x.mean(), x.std(ddof=1)

    def like(n):
        y = np.random.default_rng(7).normal(size=n)
        return mean + sd * (y - y.mean()) / y.std(ddof=1)

    assert e_value(like(needed)) >= 20 > e_value(like(needed - 1))
    assert seeds_needed([1.0, -1.0]) is None
