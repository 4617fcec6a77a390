"""The aggregate of all other clients, for each client: All-But-Me of FedReFT and Rest-of-World of FedALT.

The others of client k are all clients but k whose latest update the driver holds, absent ones included.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedray.aggregation.rule import Points, Rule
from fedray.types import ClientId, Vector

Places = npt.NDArray[np.int64]


def all_but_me(
    latest: Mapping[ClientId, Vector], wanted: Iterable[ClientId], rule: Rule, groups: Sequence[slice] = (slice(None),)
) -> dict[ClientId, Vector | None]:
    """Return the aggregate of the others' latest vectors for every wanted client; None where there are no others.

    Args:
        latest: each client's vector [d], NaN where it holds nothing. A value is aggregated over the clients that hold
            it; values with the same holders are aggregated together.
        wanted: the clients whose others are aggregated.
        rule: what aggregates.
        groups: ranges of the vector that are aggregated separately.

    Returns:
        A vector [d] for each wanted client, NaN where no other client holds a value.
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
            if outside := others.keys() - set(ids):
                everybody = rule.everybody(block)
                for id in outside:
                    found[id][group][columns] = everybody
    return {id: None if np.isnan(vector).all() else vector for id, vector in found.items()}


def _strata(points: Points) -> Iterator[tuple[Places, Places | slice, Points]]:
    """Yield rows, columns and points[rows, columns] such that exactly these rows have values in these columns. Together
    they cover all values."""
    held = ~np.isnan(points)
    if held.all():
        yield np.arange(len(points)), slice(None), points
        return
    _, first = np.unique(np.packbits(held, axis=1), axis=0, return_index=True)  # a tier's clients hold the same values
    codes = np.zeros(points.shape[1], np.int64)
    for number, row in enumerate(first, start=1):
        codes = 2 * codes + held[row]
        if number % 32 == 0:  # before 64 bits are full
            codes = np.unique(codes, return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    for columns in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        rows = np.flatnonzero(held[:, columns[0]])
        if len(rows):
            yield rows, columns, points[np.ix_(rows, columns)]
