"""The geometric median: the point with the least sum of distances to all points."""

from typing import Annotated

from pydantic import Field

from fedray.aggregation.geometric_median import Weiszfeld, geometric_median, leave_one_out_geometric_medians
from fedray.aggregation.rule import Points, Rule
from fedray.types import Vector


class GeometricMedian(Rule):
    """The geometric median, by Weiszfeld's iterations; `Weiszfeld` says more of the fields."""

    name = "geometric_median"

    smoothing: Annotated[float, Field(ge=0)] = Weiszfeld.smoothing
    """ε, relative to the points' scatter."""
    tolerance: Annotated[float, Field(gt=0)] = Weiszfeld.tolerance
    """Slope of the sum of distances at which the iterations stop."""
    max_iterations: Annotated[int, Field(ge=1)] = Weiszfeld.max_iterations
    """Cap of the iterations."""

    def everybody(self, points: Points) -> Vector:
        return geometric_median(points, None, self._settings)

    def leave_one_out(self, points: Points) -> Points:
        return leave_one_out_geometric_medians(points, self._settings)

    @property
    def _settings(self) -> Weiszfeld:
        return Weiszfeld(self.smoothing, self.tolerance, self.max_iterations)


ENTRY = GeometricMedian
