"""Statistics of repeated runs: functions of arrays of clients' scores.

A run is one seed: its partition, cohorts and initial weights. The clients of a run depend on each other, so tests and
confidence intervals treat the run as one observation; only the bootstrap also draws clients.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedray.randomness import keyed_rng

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 10_000
"""Draws of the bootstrap."""
MANY_CLIENTS = 1_000
"""Above this number of clients in a run, the mean of drawn clients is drawn from its normal limit."""
AT_A_TIME = 2_000_000
"""Drawn clients that are in memory at a time."""
EXACT_RUNS = 16
"""Up to this number of runs, the sign-flip test enumerates all 2^n flips."""
ROUNDING = 1e-9
"""Relative difference below which two sums of the sign-flip test are equal."""


def confidence_interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of independent, normally distributed values (Student's t).

    Args:
        values: the values, [n].

    Returns:
        The lower and the upper end; NaN for fewer than two values.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def run_means(runs: Sequence[np.ndarray[Any, Any]]) -> FloatArray:
    """Return each run's mean over its clients, [runs].

    Args:
        runs: one value per client of each run, each [clients]; no run is empty.
    """
    return np.array([values.mean() for values in runs])


def over_runs(runs: Sequence[np.ndarray[Any, Any]]) -> float:
    """Return the mean over clients, in which every run counts the same; NaN without runs.

    Args:
        runs: as for `run_means`.
    """
    return float(run_means(runs).mean()) if runs else float("nan")


def bootstrap_interval(runs: Sequence[FloatArray], rng: np.random.Generator, draws: int = DRAWS) -> tuple[float, float]:
    """Return the 95 % percentile interval of `over_runs` by the two-level bootstrap: runs are drawn with replacement,
    then clients within each drawn run. With one run, only clients are drawn.

    Args:
        runs: as for `run_means`.

    Returns:
        The lower and the upper end; NaN if there are fewer than two values in all.
    """
    if sum(map(len, runs)) < 2:
        return float("nan"), float("nan")
    chosen = rng.integers(len(runs), size=(draws, len(runs)))
    means = np.empty(chosen.shape)
    for number, values in enumerate(runs):
        here = chosen == number
        means[here] = _means_of_drawn(values, int(here.sum()), rng)
    low, high = np.quantile(means.mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _means_of_drawn(values: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """Return `count` means, each of as many values as there are, drawn with replacement."""
    if len(values) > MANY_CLIENTS:
        return rng.normal(values.mean(), values.std() / np.sqrt(len(values)), count)
    rows = max(1, AT_A_TIME // len(values))
    parts = [min(rows, count - start) for start in range(0, count, rows)]
    return np.concatenate(
        [values[rng.integers(len(values), size=(part, len(values)))].mean(axis=1) for part in parts] or [np.empty(0)]
    )


def paired_t_p(differences: FloatArray) -> float:
    """Return the two-sided p of the paired t test.

    Args:
        differences: one per run, [runs].

    Returns:
        NaN for fewer than two runs, or if all differences are equal, for which t is not defined.
    """
    if len(differences) < 2 or np.ptp(differences) <= ROUNDING * np.abs(differences).max():
        return float("nan")
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip_p(differences: FloatArray) -> float:
    """Return the two-sided p of the sign-flip test: the share of all 2^n ways to flip the signs of the differences
    whose sum is at least as far from 0. Its smallest value is 2 / 2^n.

    Above `EXACT_RUNS` runs, 2^16 flips are drawn, and the given signs count as one of them.

    Args:
        differences: one per run, [runs].

    Returns:
        NaN for fewer than two runs.
    """
    count = len(differences)
    if count < 2:
        return float("nan")
    if count <= EXACT_RUNS:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = 1 - 2 * keyed_rng(0, "sign flips", count).integers(2, size=(2**EXACT_RUNS, count))
        signs[0] = 1
    sums, observed = np.abs(signs @ differences), abs(differences.sum())
    return float(np.mean(sums >= observed - ROUNDING * np.abs(differences).sum()))


def holm(p_values: Sequence[float]) -> FloatArray:
    """Return p values adjusted for multiple tests by Holm's step-down procedure, in the given order. NaN stays NaN and
    counts as no test."""
    given = np.asarray(p_values, float)
    adjusted = np.full(given.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    steps = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def bottom_decile(scores: FloatArray, higher_is_better: bool) -> float:
    """Return the score that is at position ⌊K / 10⌋, counted from 0, if the worst client comes first (pFL-Bench).

    Args:
        scores: one per client, [K].

    Returns:
        NaN for fewer than 10 clients.
    """
    if len(scores) < 10:
        return float("nan")
    ordered = np.sort(scores)
    return float((ordered if higher_is_better else ordered[::-1])[len(scores) // 10])


def binomial_error(shares: FloatArray, examples: FloatArray) -> float:
    """Return the standard error √(p(1 − p) / n) of a client's share of correct examples, as the mean over clients.

    Args:
        shares: p of every client, [clients].
        examples: n of every client, [clients].
    """
    return float(np.sqrt(shares * (1 - shares) / examples).mean())


def mean_ranks(scores: FloatArray, higher_is_better: bool) -> FloatArray:
    """Return each method's mean rank over data sets; 1 is the best, and equal scores share the mean of their ranks.

    Args:
        scores: [data sets, methods].
    """
    ranks: FloatArray = stats.rankdata(-scores if higher_is_better else scores, axis=1)
    mean: FloatArray = ranks.mean(axis=0)
    return mean


def friedman_p(scores: FloatArray) -> float:
    """Return the p of Friedman's test that all methods rank alike.

    Args:
        scores: [data sets, methods].

    Returns:
        NaN for fewer than three methods, or if the methods have equal scores on every data set.
    """
    if scores.shape[1] < 3 or (scores == scores[:, :1]).all():
        return float("nan")
    return float(stats.friedmanchisquare(*scores.T).pvalue)


def wilcoxon_p(differences: FloatArray) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test.

    Args:
        differences: one per data set, [data sets].

    Returns:
        NaN if all differences are 0.
    """
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else float("nan")


def critical_difference(methods: int, data_sets: int) -> float:
    """Return Nemenyi's critical difference at 5 %: mean ranks that differ by more differ significantly.

    q_0.05(k, ∞) / √2 · √(k(k + 1) / 6N), with q the quantile of the studentised range (Demšar 2006).
    """
    quantile = stats.studentized_range.ppf(CONFIDENCE, methods, np.inf) / np.sqrt(2)
    return float(quantile * np.sqrt(methods * (methods + 1) / (6 * data_sets)))


def indistinguishable(ranks: FloatArray, difference: float) -> list[tuple[int, ...]]:
    """Return the largest groups of methods whose mean ranks are within the critical difference: the bars of a
    critical-difference plot. A group has at least two methods.

    Args:
        ranks: each method's mean rank, [methods].

    Returns:
        Groups of indices, each with the best first; groups may overlap.
    """
    order = np.argsort(ranks, kind="stable")
    groups: list[tuple[int, ...]] = []
    for start in range(len(order)):
        group = tuple(int(i) for i in order[start:] if ranks[i] - ranks[order[start]] <= difference)
        if len(group) > 1 and not any(set(group) <= set(other) for other in groups):
            groups.append(group)
    return groups
