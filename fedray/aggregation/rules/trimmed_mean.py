"""The coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498, definition 2)."""

from typing import Annotated

from pydantic import Field

from fedray.aggregation.robust import leave_one_out_trimmed_means, trimmed_mean
from fedray.aggregation.rule import Points, Rule
from fedray.types import Vector


class TrimmedMean(Rule):
    """The mean of each coordinate without its smallest and largest values."""

    name = "trimmed_mean"

    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of the clients that is left out at each end."""

    def everybody(self, points: Points) -> Vector:
        return trimmed_mean(points, self.trim)

    def leave_one_out(self, points: Points) -> Points:
        return leave_one_out_trimmed_means(points, self.trim)


ENTRY = TrimmedMean
