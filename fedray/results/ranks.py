"""Methods ranked over several data sets."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedray.results.statistics import (
    critical_difference,
    friedman_p,
    holm,
    indistinguishable,
    mean_ranks,
    wilcoxon_p,
)

FEWEST_DATA_SETS = 6
"""Data sets below which ranks are not tested: the signed-rank test of five cannot reach 5 %."""


@dataclass(frozen=True)
class Ranks:
    """The methods over several data sets.

    Attributes:
        methods: the methods that every data set has, the best mean rank first.
        mean_ranks: one per method; 1 is the best.
        friedman_p: p of the test that all rank alike; NaN for fewer than three methods or six data sets.
        critical_difference: Nemenyi's; NaN for fewer than six data sets.
        groups: methods that Nemenyi's test does not distinguish, as in a critical-difference plot.
        wilcoxon_p_holm: p of the signed-rank test against the first reference over data sets, by method, adjusted by
            Holm; empty for fewer than six data sets.
    """

    methods: tuple[str, ...]
    data_sets: tuple[str, ...]
    mean_ranks: tuple[float, ...]
    friedman_p: float
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]
    reference: str
    wilcoxon_p_holm: Mapping[str, float]


def ranks_over(means: Mapping[str, Mapping[str, float]], higher_is_better: bool, reference: str) -> Ranks | None:
    """Return the ranks of the methods that every data set has; None for one data set, or fewer than two such methods.

    Args:
        means: by data set and method.
        reference: one of these methods.
    """
    found = list(means.values())
    common = [method for method in found[0] if all(method in one for one in found)]
    if len(found) < 2 or len(common) < 2:
        return None
    scores = np.array([[one[method] for method in common] for one in found])
    ranks = mean_ranks(scores, higher_is_better)
    order = np.argsort(ranks, kind="stable")
    tested = len(found) >= FEWEST_DATA_SETS
    distance = critical_difference(len(common), len(found)) if tested else float("nan")
    groups = indistinguishable(ranks, distance) if tested else []
    others = [method for method in common if method != reference] if tested else []
    against = scores[:, common.index(reference)]
    p_values = holm([wilcoxon_p(scores[:, common.index(method)] - against) for method in others])
    return Ranks(
        methods=tuple(common[i] for i in order),
        data_sets=tuple(means),
        mean_ranks=tuple(float(ranks[i]) for i in order),
        friedman_p=friedman_p(scores) if tested else float("nan"),
        critical_difference=distance,
        groups=tuple(tuple(common[i] for i in group) for group in groups),
        reference=reference,
        wilcoxon_p_holm=dict(zip(others, map(float, p_values), strict=True)),
    )
