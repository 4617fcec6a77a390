"""A figure as data: what is shown, with its axes and units, before any library draws it.

`plotly_drawing` draws figures for the page, `matplotlib_drawing` for files. Both read nothing but these classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: what it shows, with the unit in parentheses.
        log: whether it is logarithmic.
        whole: whether only whole numbers are marked.
    """

    title: str
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Line:
    """One line, or points that are not connected.

    Attributes:
        style: index of the colour, mark and dashes; None for a line in the background, which is grey and has no entry
            in the legend.
        x, y: the points; NaN in y is a gap.
        low, high: a band around the line; empty for none.
    """

    name: str
    style: int | None
    x: FloatArray
    y: FloatArray
    low: FloatArray = field(default_factory=lambda: np.empty(0))
    high: FloatArray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Lines:
    """Lines over a common axis.

    Attributes:
        connected: whether points are connected.
    """

    lines: tuple[Line, ...]
    connected: bool = True

    def frame(self) -> pd.DataFrame:
        """Return one row per point."""
        frames = []
        for line in self.lines:
            band = {"low": line.low, "high": line.high} if len(line.low) else {}
            frames.append(pd.DataFrame({"name": line.name, "x": line.x, "y": line.y} | band))
        return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, from top to bottom.

    Attributes:
        names: of the rows.
        values: of every part by its name, each [rows]; NaN where there is none.
        stacked: whether the parts of a row follow each other, and do not lie below each other.
    """

    names: tuple[str, ...]
    values: Mapping[str, FloatArray]
    stacked: bool = True

    def frame(self) -> pd.DataFrame:
        """Return one row per bar."""
        return pd.DataFrame({"name": self.names, **self.values})


@dataclass(frozen=True)
class Intervals:
    """Values with the ends of their intervals, a row each, from top to bottom. The line at 0 is marked.

    Attributes:
        names: of the rows.
        values, low, high: each [rows]; NaN where there is none.
    """

    names: tuple[str, ...]
    values: FloatArray
    low: FloatArray
    high: FloatArray

    def frame(self) -> pd.DataFrame:
        """Return one row per interval."""
        return pd.DataFrame({"name": self.names, "value": self.values, "low": self.low, "high": self.high})


@dataclass(frozen=True)
class Box:
    """How values are distributed: the extremes, the quartiles and the mean, and values that are marked by name."""

    name: str
    lowest: float
    first_quartile: float
    median: float
    third_quartile: float
    highest: float
    mean: float
    marked: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Boxes:
    """Distributions, a row each, from top to bottom.

    Attributes:
        marked: what the marked values are, for the legend.
    """

    boxes: tuple[Box, ...]
    marked: str

    def frame(self) -> pd.DataFrame:
        """Return one row per distribution."""
        rows = []
        for box in self.boxes:
            named = "; ".join(f"{name}: {value:g}" for name, value in box.marked.items())
            rows.append({**vars(box), "marked": named})
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Heat:
    """A matrix as colours.

    Attributes:
        rows, columns: their names; rows are shown from top to bottom.
        values: [rows, columns]; NaN where there is nothing.
        legend: what the colours show, with the unit.
        kinds: if not empty, values are indices of these names, with a colour each.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: FloatArray
    legend: str
    kinds: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        """Return one row per row of the matrix."""
        table = pd.DataFrame(self.values, columns=list(self.columns))
        table.insert(0, "name", self.rows)
        return table


Marks = Lines | Bars | Intervals | Boxes | Heat


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        key: its name in files: lower-case letters, digits and hyphens.
        title: what is seen.
        x, y: the axes; rows of bars, intervals, boxes and matrices have names instead of numbers.
        note: what to know when reading it.
    """

    key: str
    title: str
    x: Axis
    y: Axis
    marks: Marks
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A figure, or several views of one, of which the page shows one at a time.

    Attributes:
        views: figures by the name of the view.
    """

    title: str
    views: Mapping[str, Figure]

    @classmethod
    def of(cls, figure: Figure) -> "Card":
        """Return a card with one view."""
        return cls(figure.title, {"": figure})


@dataclass(frozen=True)
class Listing:
    """A table whose columns need no alignment by numbers, such as the event log."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def slug(*parts: str) -> str:
    """Return words as the key of a figure, which names its files."""
    return "-".join("".join(letter if letter.isalnum() else "-" for letter in part.lower()) for part in parts)


def array(values: Any) -> FloatArray:
    """Return values as float64, NaN where there is no number."""
    found: FloatArray = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce").to_numpy(np.float64)
    return found


def thinned(count: int, most: int) -> npt.NDArray[np.intp]:
    """Return at most `most` evenly spread indices of `count` points, with the first and the last one."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.intp))


def unit_of(values: Sequence[float] | FloatArray, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """Return the largest unit that the largest value reaches, or the first one.

    Args:
        units: sizes with names, the smallest first.
    """
    finite = np.abs(np.asarray(values, float))
    largest = float(np.nanmax(finite, initial=0.0)) if np.isfinite(finite).any() else 0.0
    return next((unit for unit in reversed(units) if largest >= unit[0]), units[0])


COUNTS = ((1.0, ""), (1e3, "thousand"), (1e6, "million"))
BYTES = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
SECONDS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"))
