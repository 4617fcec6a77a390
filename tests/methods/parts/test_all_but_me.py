"""Everybody else's aggregate, against a loop over clients that knows nothing of leave-one-out formulas."""

import numpy as np
import pytest
from scipy.optimize import minimize

from fedray.aggregation.rule import RULES
from fedray.methods.parts.all_but_me import all_but_me


def plainly(latest, me, aggregate):
    """Agg of everybody but me, one client after another; None where nobody is left."""
    others = [vector for id, vector in latest.items() if id != me]
    return aggregate(np.array(others, np.float64)) if others else None


def mean(points):
    return sum(points) / len(points)


def median_by_optimiser(points):
    """The point with the least sum of distances, found by a general-purpose optimiser; of two points, their mean."""
    if len(points) <= 2:
        return points.mean(axis=0)
    found = minimize(
        lambda x: sum(np.linalg.norm(x - p) for p in points),
        points.mean(axis=0),
        jac=lambda x: sum((x - p) / np.linalg.norm(x - p) for p in points),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    return found.x


def trimmed(points, trim=0.25):
    """Per coordinate without the ⌊trim · n⌋ smallest and largest."""
    g = int(trim * len(points))
    return np.array([np.mean(sorted(column)[g : len(column) - g]) for column in points.T])


@pytest.mark.parametrize("holders", [2, 3, 5, 6])
@pytest.mark.parametrize(
    ("name", "plain", "tolerance"),
    [("mean", mean, 1e-6), ("geometric_median", median_by_optimiser, 1e-5), ("trimmed_mean", trimmed, 1e-6)],
)
def test_against_a_loop_over_clients(spread, name, plain, tolerance, holders):
    """The last client holds nothing yet and sees everybody. With two others every point between them is a median, and
    their mean is taken."""
    latest = dict(zip("abcdef"[:holders], spread(holders, 4), strict=True))
    found = all_but_me(latest, [*latest, "newcomer"], RULES.parse({"name": name, "trim": 0.25}))
    for id in [*latest, "newcomer"]:
        np.testing.assert_allclose(found[id], plainly(latest, id, plain), atol=tolerance)
        assert found[id].dtype == np.float32


def test_median_in_one_dimension():
    """On a line the geometric median of an odd number of points is the middle one.

    Without d the others are 0, 1, 10: median 1, mean 11/3.
    """
    latest = {id: np.array([x, 0], np.float32) for id, x in zip("abcd", [0, 1, 10, -7], strict=True)}
    found = {name: all_but_me(latest, ["d"], RULES.parse(name))["d"] for name in ("geometric_median", "mean")}
    np.testing.assert_allclose(found["geometric_median"], [1, 0], atol=1e-5)
    np.testing.assert_allclose(found["mean"], [11 / 3, 0], rtol=1e-6)


def test_one_sign_flipper_moves_the_mean_and_hardly_the_median():
    """Others of e: three at 1 and one at −99. The mean is (3 − 99)/4 = −24; three coinciding points outweigh one, so
    the median is theirs."""
    latest = {id: np.array([x], np.float32) for id, x in zip("abcde", [1, 1, 1, -99, 0], strict=True)}
    assert all_but_me(latest, ["e"], RULES.parse("mean"))["e"] == -24
    np.testing.assert_allclose(all_but_me(latest, ["e"], RULES.parse("geometric_median"))["e"], [1], atol=1e-4)


def test_with_three_clients_median_and_mean_agree_and_with_five_they_do_not(spread):
    for count, agree in [(3, True), (5, False)]:
        latest = dict(zip("abcde"[:count], spread(count, 4), strict=True))
        means, medians = (all_but_me(latest, latest, RULES.parse(name)) for name in ("mean", "geometric_median"))
        for id in latest:
            assert np.array_equal(means[id], medians[id]) == agree
            assert agree or np.abs(means[id] - medians[id]).max() > 1e-2


def test_nobody_else_is_none_and_not_zero():
    point = np.ones(2, np.float32)
    for name in ("mean", "geometric_median", "trimmed_mean"):
        assert all_but_me({}, ["a", "b"], RULES.parse(name)) == {"a": None, "b": None}
        found = all_but_me({"a": point}, ["a", "b"], RULES.parse(name))
        assert found["a"] is None
        assert np.array_equal(found["b"], point)


def test_only_those_who_are_asked_for_and_in_any_order(spread):
    points = spread(4, 3)
    latest = dict(zip("abcd", points, strict=True))
    backwards = dict(zip("dcba", points[::-1], strict=True))
    every = all_but_me(latest, "abcd", RULES.parse("mean"))
    some = all_but_me(backwards, iter("db"), RULES.parse("mean"))
    assert list(some) == ["d", "b"]
    assert all(np.array_equal(some[id], every[id]) for id in some)


def test_groups_are_aggregated_each_on_its_own(spread):
    points = spread(5, 5)
    latest = dict(zip("abcde", points, strict=True))
    groups = [slice(0, 2), slice(2, 5)]
    grouped = all_but_me(latest, [*latest, "new"], RULES.parse("geometric_median"), groups)
    for id in grouped:
        others = np.array([latest[other] for other in latest if other != id], np.float64)
        expected = np.concatenate([median_by_optimiser(others[:, group]) for group in groups])
        np.testing.assert_allclose(grouped[id], expected, atol=1e-5)
    whole = all_but_me(latest, ["new"], RULES.parse("geometric_median"))["new"]
    assert np.abs(grouped["new"] - whole).max() > 1e-3


@pytest.mark.parametrize(("name", "plain"), [("mean", mean), ("geometric_median", median_by_optimiser)])
def test_what_some_do_not_hold_is_aggregated_over_those_who_do(spread, name, plain):
    """Values 0 and 1 are everybody's, 2 and 3 those of a, b, c and e, 4 is held by e alone, 5 by nobody."""
    points = spread(5, 6)
    points[[3], 2:4] = np.nan
    points[:4, 4] = np.nan
    points[:, 5] = np.nan
    latest = dict(zip("abcde", points, strict=True))
    found = all_but_me(latest, [*latest, "new"], RULES.parse(name))
    for id in found:
        rows = [row for row, other in enumerate("abcde") if other != id]
        np.testing.assert_allclose(found[id][:2], plain(points[rows, :2].astype(np.float64)), atol=1e-5)
        assert np.isnan(found[id][5])
        rows = [row for row in rows if row != 3]
        np.testing.assert_allclose(found[id][2:4], plain(points[rows, 2:4].astype(np.float64)), atol=1e-5)
    assert all(found[id][4] == points[4, 4] for id in [*"abcd", "new"])
    assert np.isnan(found["e"][4])


def test_more_patterns_than_an_integer_has_bits():
    """Ninety clients, each of which lacks other values: the mean over the others that hold a value, one by one."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(90, 40)).astype(np.float32)
    points[rng.random(points.shape) < 0.5] = np.nan
    found = all_but_me({f"{row:02}": point for row, point in enumerate(points)}, ["00", "57"], RULES.parse("mean"))
    for id, vector in found.items():
        expected = np.nanmean(np.delete(points, int(id), axis=0).astype(float), axis=0)
        np.testing.assert_allclose(vector, expected, atol=1e-6)
