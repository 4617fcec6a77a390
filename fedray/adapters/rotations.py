"""Averages of rotations are not rotations: restores orthonormal rows in the R slots of a vector."""

from fedray.adapters.layout import Layout
from fedray.aggregation.stiefel import retract
from fedray.types import Vector


def retract_rotations(layout: Layout, vector: Vector) -> Vector:
    """Return the vector with every slot of part R replaced by its polar factor; the other slots unchanged."""
    result = vector.copy()
    for slot, view in layout.items(result):
        if slot.part == "R":
            view[...] = retract(view)
    return result
