"""Figures as plotly reads them: a mapping of traces and a layout. Colours of text and lines of the page are added by
the page, which knows whether it is dark."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from fedray.report.figure import Axis, Bars, Boxes, Figure, FloatArray, Heat, Intervals, Line, Lines
from fedray.report.style import COLOURS, PATTERNS, SEQUENTIAL, style

Trace = dict[str, Any]

DIGITS = 5
"""Significant digits of a number."""
LINE_HEIGHT = 400
"""Height of a figure with lines, in pixels."""
AROUND = 130
"""Pixels above and below rows."""
LONGEST_NAME = 26
"""Letters of a row's or a column's name."""
MARKED_POINTS = 30
"""Points of a line up to which each is marked."""


def drawing(figure: Figure) -> dict[str, Any]:
    """Return what plotly draws, `data` and `layout`, and `labels`: by axis, the names of its rows or columns, and the
    texts that are shown for them. The page wraps titles and chooses labels by its width."""
    marks = figure.marks
    layout: dict[str, Any] = {
        "xaxis": _axis(figure.x),
        "yaxis": _axis(figure.y),
        "height": LINE_HEIGHT,
        "margin": {"l": 50, "r": 32, "t": 12, "b": 44},
        "modebar": {"orientation": "v"},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "showlegend": False,
    }
    labels: dict[str, Any] = {}
    if isinstance(marks, Lines):
        data = _lines(marks, layout)
        if figure.x.whole:
            layout["xaxis"] |= {"tick0": 0, "dtick": _step(marks), "tickformat": ",d"}
    elif isinstance(marks, Heat):
        data = _heat(marks, layout, labels)
    else:
        rows = _rows(marks)
        per_row = 24 if not isinstance(marks, Bars) or marks.stacked else 18 * len(marks.values)
        layout["height"] = AROUND + max(3, len(rows)) * per_row
        layout["yaxis"] |= {"type": "category", "range": [len(rows) - 0.5, -0.5]}
        labels["yaxis"] = _labels(rows)
        data = {Bars: _bars, Intervals: _intervals, Boxes: _boxes}[type(marks)](marks, layout)  # type: ignore[operator]
    return {"data": data, "layout": layout, "labels": labels}


def _axis(axis: Axis) -> Trace:
    found: Trace = {"title": {"text": escape(axis.title), "standoff": 8}, "automargin": True}
    if axis.log:
        found["type"] = "log"
    return found


def _labels(names: Sequence[str]) -> Trace:
    return {"names": [escape(name) for name in names], "texts": [escape(shortened(name)) for name in names]}


def shortened(name: str, most: int = LONGEST_NAME) -> str:
    """Return a name of at most `most` letters, with its beginning and its end."""
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"


def numbers(values: FloatArray | Iterable[float]) -> list[float | None]:
    """Return numbers with the digits that can be seen; null where there is none."""
    return [_short(float(value)) for value in values]


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.{DIGITS}g}")


def _lines(marks: Lines, layout: Trace) -> list[Trace]:
    layout["showlegend"] = any(line.style is not None for line in marks.lines)
    traces: list[Trace] = []
    for line in sorted(marks.lines, key=lambda one: one.style is not None):
        traces += _line(line, marks.connected)
    return traces


def _step(marks: Lines) -> int:
    """Return the distance of about ten marks at whole numbers."""
    span = float(max(line.x.max() for line in marks.lines) - min(line.x.min() for line in marks.lines))
    return next(step for step in (int(d * 10**e) for e in range(16) for d in (1, 2, 5)) if 12 * step >= span)


def _line(line: Line, connected: bool) -> list[Trace]:
    look, name = style(line.style), escape(line.name)
    marked = not connected or len(line.x) <= MARKED_POINTS
    mode = "markers" if not connected else "lines+markers" if marked else "lines"
    in_background = line.style is None
    trace: Trace = {
        "type": "scatter",
        "mode": "lines" if connected and in_background and len(line.x) > 1 else mode,
        "name": name,
        "x": numbers(line.x),
        "y": numbers(line.y),
        "legendgroup": name,
        "showlegend": not in_background,
        "line": {"color": look.colour, "width": 1 if in_background else 2, "dash": look.dash},
        "marker": {"color": look.colour, "symbol": look.mark, "size": 11 if not connected else 7},
        "hovertemplate": f"<b>{name}</b><br>%{{x}}: %{{y}}<extra></extra>",
    }
    if in_background:
        trace["opacity"] = 0.6
    if not len(line.low):
        return [trace]
    red, green, blue = (int(look.colour[i : i + 2], 16) for i in (1, 3, 5))
    edge = {"type": "scatter", "mode": "lines", "x": trace["x"], "legendgroup": name, "showlegend": False}
    edge |= {"line": {"width": 0}, "hoverinfo": "skip"}
    filled = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.13)"}
    return [edge | {"y": numbers(line.low)}, edge | filled | {"y": numbers(line.high)}, trace]


def _rows(marks: Bars | Intervals | Boxes) -> tuple[str, ...]:
    return tuple(box.name for box in marks.boxes) if isinstance(marks, Boxes) else marks.names


def _bars(marks: Bars, layout: Trace) -> list[Trace]:
    layout |= {"barmode": "stack" if marks.stacked else "group", "showlegend": len(marks.values) > 1, "bargap": 0.3}
    layout["xaxis"]["rangemode"] = "tozero"
    names = [escape(name) for name in marks.names]
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(part),
            "y": names,
            "x": numbers(values),
            "marker": {"color": COLOURS[i % len(COLOURS)], "pattern": {"shape": PATTERNS[i % len(PATTERNS)]}},
            "hovertemplate": f"<b>%{{y}}</b><br>{escape(part)}: %{{x}}<extra></extra>",
        }
        for i, (part, values) in enumerate(marks.values.items())
    ]


def _intervals(marks: Intervals, layout: Trace) -> list[Trace]:
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "layer": "below"}
    layout["shapes"] = [line | {"line": {"dash": "dash", "width": 1, "color": "#8a8f98"}}]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "y": [escape(name) for name in marks.names],
            "x": numbers(marks.values),
            "marker": {"color": COLOURS[0], "size": 9},
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": numbers(marks.high - marks.values),
                "arrayminus": numbers(marks.values - marks.low),
                "color": COLOURS[0],
            },
            "customdata": [[low, high] for low, high in zip(numbers(marks.low), numbers(marks.high), strict=True)],
            "hovertemplate": "<b>%{y}</b><br>%{x} [%{customdata[0]}, %{customdata[1]}]<extra></extra>",
        }
    ]


def _boxes(marks: Boxes, layout: Trace) -> list[Trace]:
    layout["showlegend"] = True
    boxes = marks.boxes
    names = [escape(box.name) for box in boxes]
    fields = {"q1": "first_quartile", "median": "median", "q3": "third_quartile"}
    fields |= {"lowerfence": "lowest", "upperfence": "highest", "mean": "mean"}
    marked = [(escape(box.name), escape(name), value) for box in boxes for name, value in box.marked.items()]
    return [
        {
            "type": "box",
            "orientation": "h",
            "y": names,
            **{name: numbers(getattr(box, field) for box in boxes) for name, field in fields.items()},
            "name": "all clients",
            "line": {"color": COLOURS[0], "width": 1.5},
            "boxmean": True,
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": escape(marks.marked),
            "y": [row for row, _, _ in marked],
            "x": numbers(value for _, _, value in marked),
            "text": [name for _, name, _ in marked],
            "marker": {"color": COLOURS[1], "symbol": "x", "size": 8},
            "hovertemplate": "<b>%{text}</b><br>%{y}: %{x}<extra></extra>",
        },
    ]


def _heat(marks: Heat, layout: Trace, labels: Trace) -> list[Trace]:
    layout["height"] = AROUND + 60 + min(520, max(4, len(marks.rows)) * 20)
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"] |= {"type": "category", "range": [len(marks.rows) - 0.5, -0.5]}
    labels |= {"xaxis": _labels(marks.columns), "yaxis": _labels(marks.rows)}
    trace: Trace = {
        "type": "heatmap",
        "x": [escape(name) for name in marks.columns],
        "y": [escape(name) for name in marks.rows],
        "z": [numbers(row) for row in marks.values],
        "hoverongaps": False,
        "hovertemplate": f"%{{y}}<br>%{{x}}: %{{z}}<extra>{escape(marks.legend)}</extra>",
        "colorbar": {
            "title": {"text": escape(marks.legend), "side": "top"},
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "len": 0.6,
            "thickness": 10,
        },
        "colorscale": SEQUENTIAL,
    }
    known = marks.values[np.isfinite(marks.values)]
    if not marks.kinds and len(known) and known.min() >= 0:
        trace |= {"zmin": 0, "zmax": _short(float(known.max()))}
    if marks.kinds:
        count = len(marks.kinds)
        edges = [(i / count, COLOURS[i % len(COLOURS)], (i + 1) / count) for i in range(count)]
        trace |= {
            "zmin": -0.5,
            "zmax": count - 0.5,
            "colorscale": [[at, colour] for low, colour, high in edges for at in (low, high)],
        }
        trace["colorbar"] |= {"tickvals": list(range(count)), "ticktext": [str(i) for i in range(count)]}
    return [trace]
