"""The statistics against numbers derived by hand, scipy's tests, published tables, and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from fedray.results.statistics import (
    MANY_CLIENTS,
    binomial_error,
    bootstrap_interval,
    bottom_decile,
    confidence_interval,
    critical_difference,
    friedman_p,
    holm,
    indistinguishable,
    mean_ranks,
    over_runs,
    paired_t_p,
    sign_flip_p,
    wilcoxon_p,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_run_counts_the_same() -> None:
    """(1 + 3) / 2 = 2 and 6: their mean is 4, whereas the mean of the three clients would be 10 / 3."""
    assert over_runs([np.array([1.0, 3.0]), np.array([6.0])]) == 4
    assert np.isnan(over_runs([]))


# ---------------------------------------------------------------- bootstrap


def test_the_bootstrap_of_two_values_by_hand() -> None:
    """One run with the values 0 and 1: the mean of two drawn ones is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4. More
    than 2.5 % are at either end, so the interval is [0, 1]. Of eight values with one 1, the mean of the drawn is k / 8
    with k of Binomial(8, 1/8): P(k = 0) = 0.34, P(k ≤ 2) = 0.933, P(k ≤ 3) = 0.990, so the upper end is 3/8."""
    assert bootstrap_interval([np.array([0.0, 1.0])], rng()) == (0, 1)
    assert bootstrap_interval([np.eye(8)[0]], rng()) == (0, 3 / 8)


def test_runs_are_drawn_before_clients() -> None:
    """Runs without differences between their clients: only runs are drawn. Of the means 0, 0, 0, 1 the drawn mean is
    k / 4 with k of Binomial(4, 1/4): P(k = 0) = 0.316, P(k ≤ 2) = 0.949, P(k ≤ 3) = 0.996: [0, 3/4]."""
    runs = [np.full(20, float(mean)) for mean in (0, 0, 0, 1)]
    assert bootstrap_interval(runs, rng()) == (0, 0.75)


def test_the_bootstraps_variance_by_the_formula() -> None:
    """The variance of the drawn mean is s²_B / S for the runs' means plus the mean of s²_W / K within runs, over S; the
    variances divide by S and K. The 95 % interval is 3.92 standard deviations wide if the mean is normal."""
    drawn = rng(1)
    runs = [drawn.normal(drawn.normal(0, 1), 2, 50) for _ in range(40)]
    variance = np.var([run.mean() for run in runs]) / 40 + np.mean([run.var() / 50 for run in runs]) / 40
    low, high = bootstrap_interval(runs, rng(), draws=40_000)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.03)


def test_one_value_has_no_interval() -> None:
    assert np.isnan(bootstrap_interval([np.array([0.5])], rng())).all()
    assert np.isnan(bootstrap_interval([], rng())).all()


def test_an_interval_is_reproducible_and_moves_with_its_values() -> None:
    runs = [rng(seed).normal(0, 1, 20) for seed in range(3)]
    low, high = bootstrap_interval(runs, rng())
    assert bootstrap_interval(runs, rng()) == (low, high)
    moved = bootstrap_interval([2 * run + 5 for run in runs], rng())
    assert moved == (pytest.approx(2 * low + 5), pytest.approx(2 * high + 5))
    mirrored = bootstrap_interval([-run for run in runs], rng())
    assert mirrored == (pytest.approx(-high), pytest.approx(-low))


def test_many_clients_are_drawn_from_the_normal_limit() -> None:
    """On either side of the limit, the interval of n values of variance 1/12 is 2 · 1.96 · √(1 / 12n) wide."""
    for count in (MANY_CLIENTS, MANY_CLIENTS + 1):
        low, high = bootstrap_interval([np.arange(count) / count], rng(), draws=2_000)
        assert high - low == pytest.approx(2 * 1.96 / np.sqrt(12 * count), rel=0.06)


SIMULATIONS = 600
SEEDS, CLIENTS = 5, 20


def expected_coverage(between: float) -> float:
    """Return the probability that the bootstrap's interval contains the truth, by an independent formula.

    Let a seed's mean vary by 1 because of its clients and by b (`between`) because of the seed. The mean of S seeds has
    the variance (b + 1) / S. The bootstrap's variance is that between the seeds' means, which divides by S, plus that
    within seeds, which divides by K: (S − 1)/S · (b + 1) · X / (S − 1) + (K − 1)/K, over S, with X of χ² with S − 1
    degrees of freedom (the part within seeds hardly varies). Given X, the interval contains the truth with the
    probability 2Φ(1.96 · ratio of the standard deviations) − 1.
    """

    def given(x: float) -> float:
        ratio = np.sqrt(x / SEEDS + (CLIENTS - 1) / CLIENTS / (between + 1))
        return float((2 * stats.norm.cdf(1.96 * ratio) - 1) * stats.chi2(SEEDS - 1).pdf(x))

    return float(integrate.quad(given, 0, np.inf)[0])


@pytest.mark.parametrize(
    ("between", "coverage"),
    [
        pytest.param(0.0, 0.984, id="clients differ, seeds do not"),
        pytest.param(1.0, 0.954, id="seeds add as much variance as clients"),
        pytest.param(10.0, 0.879, id="seeds differ, clients hardly"),
    ],
)
def test_coverage_of_the_intervals(between: float, coverage: float) -> None:
    """How often 95 % intervals of 5 seeds with 20 clients contain the true difference, 0.3. The t interval holds its
    level exactly, since the seeds' means are normal; the bootstrap has `expected_coverage`, as docs/statistics.md says.

    Tolerance: three standard errors of as many coin flips as there are simulations, 3 √(p(1 − p) / 600), which is
    0.027 at 0.95 and 0.040 at 0.88; 0.015 is added for the bootstrap's 1,000 draws and for its skewness, which the
    formula leaves out.
    """
    assert expected_coverage(between) == pytest.approx(coverage, abs=5e-4)
    drawn = rng(7)
    inside = np.zeros(2)
    for _ in range(SIMULATIONS):
        effects = 0.3 + drawn.normal(0, np.sqrt(between), SEEDS)
        runs = [drawn.normal(effect, np.sqrt(CLIENTS), CLIENTS) for effect in effects]
        bootstrap = bootstrap_interval(runs, drawn, draws=1_000)
        t = confidence_interval(np.array([run.mean() for run in runs]))
        inside += [low <= 0.3 <= high for low, high in (bootstrap, t)]
    for found, expected in zip(inside / SIMULATIONS, (coverage, 0.95), strict=True):
        assert abs(found - expected) < 3 * np.sqrt(expected * (1 - expected) / SIMULATIONS) + 0.015


# ---------------------------------------------------------------- tests over seeds


def test_the_sign_flip_test_by_hand() -> None:
    """Of the 2³ flips of (1, 2, 4), the sums are ±7, ±5, ±3, ±1: only ±7 are as far as 7, so p = 2 / 8. Of (1, 1, −1),
    with sums ±3 and six times ±1, all are as far as 1: p = 1. Zeros flip into themselves: (3, 0) gives 3 four times in
    absolute value: p = 1."""
    assert sign_flip_p(np.array([1.0, 2.0, 4.0])) == 2 / 8
    assert sign_flip_p(np.array([1.0, 1.0, -1.0])) == 1
    assert sign_flip_p(np.array([3.0, 0.0])) == 1
    assert sign_flip_p(np.zeros(4)) == 1
    assert sign_flip_p(np.full(5, 0.1)) == 0.0625, "the smallest with five seeds"
    assert np.isnan(sign_flip_p(np.array([1.0])))


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=9))
def test_the_sign_flip_test_is_scipys(differences: list[float]) -> None:
    values = np.round(np.array(differences), 3)
    found = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(values) == pytest.approx(min(1, found.pvalue))


def test_many_runs_have_drawn_flips() -> None:
    """For 25 normal differences, the test is close to the t test."""
    values = rng(3).normal(0.35, 1, 25)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)
    assert sign_flip_p(np.ones(40)) == 2**-16, "the given signs are one of them"


def test_the_paired_t_test_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / √3, t = 3.4641 with 2 degrees of freedom. For 2 degrees,
    p = 1 − t / √(t² + 2) = 1 − 3.4641 / 3.7417 = 0.0742."""
    assert paired_t_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - np.sqrt(12 / 14))
    assert np.isnan(paired_t_p(np.array([0.1, 0.1, 0.1]))), "equal differences have no t"
    assert np.isnan(paired_t_p(np.zeros(3)))
    assert np.isnan(paired_t_p(np.array([2.0])))


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03 times 3, 2, 1: 0.03, 0.04, 0.03, of which the last rises to 0.04."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    np.testing.assert_allclose(holm([np.nan, 0.04, 0.5]), [np.nan, 0.08, 0.5])
    assert len(holm([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values) - 1e-12).all()
    assert (adjusted <= np.minimum(1, len(p_values) * np.array(p_values)) + 1e-12).all()
    order = np.argsort(p_values)
    assert (np.diff(adjusted[order]) >= 0).all()


# ---------------------------------------------------------------- clients


def test_the_bottom_decile_by_hand() -> None:
    """Of 10 clients the second worst, at position ⌊10 / 10⌋ = 1; of 25 the third worst."""
    scores = rng().permutation(np.arange(25.0))
    assert bottom_decile(scores, True) == 2
    assert bottom_decile(scores, False) == 22
    assert bottom_decile(np.arange(10.0), True) == 1
    assert np.isnan(bottom_decile(np.arange(9.0), True))


def test_the_binomial_error_by_hand() -> None:
    """√(0.5 · 0.5 / 25) = 0.1 and √(0.9 · 0.1 / 100) = 0.03: their mean is 0.065."""
    assert binomial_error(np.array([0.5, 0.9]), np.array([25, 100])) == pytest.approx(0.065)
    assert binomial_error(np.array([1.0]), np.array([9])) == 0


# ---------------------------------------------------------------- data sets


def test_mean_ranks_by_hand() -> None:
    """Scores (0.9, 0.8, 0.8): ranks 1, 2.5, 2.5; (0.5, 0.6, 0.7): 3, 2, 1; means 2, 2.25, 1.75."""
    scores = np.array([[0.9, 0.8, 0.8], [0.5, 0.6, 0.7]])
    assert mean_ranks(scores, True).tolist() == [2, 2.25, 1.75]
    assert mean_ranks(scores, False).tolist() == [2, 1.75, 2.25]


@pytest.mark.parametrize(
    ("methods", "quantile"),
    [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (9, 3.102), (10, 3.164)],
)
def test_the_critical_difference_is_that_of_demsars_table(methods: int, quantile: float) -> None:
    """J. Demšar, Statistical comparisons of classifiers over multiple data sets (JMLR 2006), table 5a: q_0.05."""
    difference = critical_difference(methods, 14)
    assert difference / np.sqrt(methods * (methods + 1) / (6 * 14)) == pytest.approx(quantile, abs=1e-3)


def test_friedman_by_hand() -> None:
    """Three methods that rank 1, 2, 3 on all six data sets: 12N / (k(k + 1)) · Σ (R − 2)² = 12 · 6 / 12 · 2 = 12 with 2
    degrees of freedom, for which p = exp(−12 / 2)."""
    scores = np.array([[0.9, 0.8, 0.7]] * 6) + np.arange(6)[:, None]
    assert friedman_p(scores) == pytest.approx(np.exp(-6))
    assert np.isnan(friedman_p(scores[:, :2]))
    assert np.isnan(friedman_p(np.ones((6, 3))))


def test_wilcoxon_by_hand() -> None:
    """Six differences of one sign: 2 / 2⁶."""
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == 2 / 64
    assert np.isnan(wilcoxon_p(np.zeros(6)))


def test_groups_that_are_not_distinguished() -> None:
    """Mean ranks 1, 1.8, 2.6, 4 with a critical difference of 1: 1 and 1.8, and 1.8 and 2.6, but not 1 and 2.6; the
    last is alone."""
    ranks = np.array([2.6, 1.0, 4.0, 1.8])
    assert indistinguishable(ranks, 1.0) == [(1, 3), (3, 0)]
    assert indistinguishable(ranks, 5.0) == [(1, 3, 0, 2)]
    assert indistinguishable(ranks, 0.5) == []
