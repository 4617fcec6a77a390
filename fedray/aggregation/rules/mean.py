"""The unweighted mean."""

from fedray.aggregation.means import leave_one_out_means, weighted_mean
from fedray.aggregation.rule import Points, Rule
from fedray.types import Vector


class Mean(Rule):
    """The mean, in which every client counts the same."""

    name = "mean"

    def everybody(self, points: Points) -> Vector:
        return weighted_mean(points)

    def leave_one_out(self, points: Points) -> Points:
        return leave_one_out_means(points)


ENTRY = Mean
