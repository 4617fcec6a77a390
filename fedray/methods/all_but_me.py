"""What everybody else holds, for each client: All-But-Me of FedReFT and Rest-of-World of FedALT.

Others of k: every client other than k whose latest update the driver holds, absent ones included.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedray.aggregation.geometric_median import Weiszfeld, geometric_median, leave_one_out_geometric_medians
from fedray.aggregation.means import leave_one_out_means, weighted_mean
from fedray.aggregation.robust import leave_one_out_trimmed_means, trimmed_mean
from fedray.types import ClientId, Vector

Points = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
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


def all_but_me(
    latest: Mapping[ClientId, Vector], wanted: Iterable[ClientId], rule: Rule, groups: Sequence[slice] = (slice(None),)
) -> dict[ClientId, Vector | None]:
    """Return the aggregate of the others' latest vectors for every wanted client; None where there are no others.

    latest: [d] each, NaN where a client holds nothing: a value is aggregated over those who hold it, values with the
    same holders together. groups: ranges of the vector that are aggregated on their own.

    Returns: [d] each, NaN where nobody else holds a value.
    """
    holders = sorted(latest)
    wanted = list(wanted)
    others: dict[ClientId, Vector | None] = dict.fromkeys(wanted)
    if not holders:
        return others
    points = np.stack([latest[id] for id in holders])
    found = {id: np.full(points.shape[1], np.nan, np.float32) for id in others}
    for group in groups:
        for rows, columns, block in _strata(points[:, group]):
            ids = [holders[row] for row in rows]
            if len(ids) > 1 and not others.keys().isdisjoint(ids):
                for id, row in zip(ids, rule.leave_one_out(block), strict=True):
                    if id in found:
                        found[id][group][columns] = row
            if newcomers := [id for id in others if id not in latest]:
                everybody = rule.everybody(block)
                for id in newcomers:
                    found[id][group][columns] = everybody
    return {id: None if np.isnan(vector).all() else vector for id, vector in found.items()}


def _strata(points: Points) -> Iterator[tuple[Places, Places | slice, Points]]:
    """Yield rows, columns and points[rows, columns] such that these rows alone have values in these columns; together
    that is all that anybody holds."""
    held = ~np.isnan(points)
    if held.all():
        yield np.arange(len(points)), slice(None), points
        return
    patterns, kind = np.unique(np.packbits(held, axis=1), axis=0, return_inverse=True)  # a handful: one per tier
    codes = np.zeros(points.shape[1], np.int64)
    for index in range(len(patterns)):
        codes = 2 * codes + held[np.flatnonzero(kind == index)[0]]
    for code in np.unique(codes):
        columns = np.flatnonzero(codes == code)
        rows = np.flatnonzero(held[:, columns[0]])
        if len(rows):
            yield rows, columns, points[np.ix_(rows, columns)]
