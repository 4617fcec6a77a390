"""What everybody else holds, for each client: All-But-Me of FedReFT and Rest-of-World of FedALT.

Others of k: every client other than k whose latest update the driver holds, absent ones included.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedray.aggregation.geometric_median import Weiszfeld, geometric_median, leave_one_out_geometric_medians
from fedray.aggregation.means import leave_one_out_means, weighted_mean
from fedray.aggregation.robust import leave_one_out_trimmed_means, trimmed_mean
from fedray.types import ClientId, Vector

Points = npt.NDArray[np.float32]
RuleName = Literal["mean", "geometric_median", "trimmed_mean"]


@dataclass(frozen=True)
class Rule:
    """everybody: [n, d] -> [d]. leave_one_out: [n, d] -> [n, d], row k without point k."""

    everybody: Callable[[Points], Vector]
    leave_one_out: Callable[[Points], Points]


def rule(name: RuleName, weiszfeld: Weiszfeld | None = None, trim: float = 0.2) -> Rule:
    """Return the aggregation rule of that name."""
    settings = weiszfeld or Weiszfeld()
    return {
        "mean": Rule(weighted_mean, leave_one_out_means),
        "geometric_median": Rule(
            lambda points: geometric_median(points, None, settings),
            lambda points: leave_one_out_geometric_medians(points, settings),
        ),
        "trimmed_mean": Rule(
            lambda points: trimmed_mean(points, trim), lambda points: leave_one_out_trimmed_means(points, trim)
        ),
    }[name]


def by_group(rule: Rule, groups: list[slice]) -> Rule:
    """Return the rule applied to each range of the vector on its own."""
    return Rule(
        lambda points: np.concatenate([rule.everybody(points[:, group]) for group in groups]),
        lambda points: np.concatenate([rule.leave_one_out(points[:, group]) for group in groups], axis=1),
    )


def all_but_me(
    latest: Mapping[ClientId, Vector], wanted: Iterable[ClientId], rule: Rule
) -> dict[ClientId, Vector | None]:
    """Return the aggregate of the others' latest vectors for every wanted client; None where there are no others."""
    holders = sorted(latest)
    wanted = list(wanted)
    others: dict[ClientId, Vector | None] = dict.fromkeys(wanted)
    if not holders:
        return others
    points = np.stack([latest[id] for id in holders])
    if len(holders) > 1 and not latest.keys().isdisjoint(wanted):
        without = rule.leave_one_out(points)
        others |= {id: without[row] for row, id in enumerate(holders) if id in others}
    if newcomers := [id for id in wanted if id not in latest]:
        others |= dict.fromkeys(newcomers, rule.everybody(points))
    return others
