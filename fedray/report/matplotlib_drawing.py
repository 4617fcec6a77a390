"""Figures as files: each as SVG and PNG, with its data as CSV."""

import json
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from fedray.errors import ConfigError
from fedray.report.figure import Axis, Bars, Boxes, Figure, Heat, Intervals, Lines, thinned
from fedray.report.plotly_drawing import MARKED_POINTS, shortened
from fedray.report.style import COLOURS, GREY, PATTERNS, SEQUENTIAL, style
from fedray.storage.paths import StoragePath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INDEX = "figures.json"
"""Names and titles of the figures of a folder; marks it as one whose figures a later report may overwrite."""
MARKS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "x": "X",
    "cross": "P",
    "star": "*",
    "triangle-down": "v",
}
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
WIDTH = 7.2
"""Of a figure, in inches."""
DPI = 150
LABELLED_ROWS = 40
LABELLED_COLUMNS = 30
SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7ec",
    "svg.fonttype": "none",
    "svg.hashsalt": "fedray",
    "hatch.linewidth": 0.6,
}


def write_figures(figures: Sequence[Figure], folder: StoragePath) -> None:
    """Write every figure as KEY.svg, KEY.png and KEY.csv, and their titles to figures.json.

    Args:
        folder: is empty, does not exist, or has the figures of an earlier report.

    Raises:
        ConfigError: the folder has other files.
        StorageError: a file cannot be written.
    """
    check_folder(folder)
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        for figure in figures:
            canvas = canvas_of(figure)
            for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": DPI})):
                buffer = BytesIO()
                canvas.savefig(buffer, format=kind, **options)
                (folder / f"{figure.key}.{kind}").write(buffer.getvalue())
            (folder / f"{figure.key}.csv").write(figure.marks.frame().to_csv(index=False).encode())
    titles = {figure.key: {"title": figure.title, "note": figure.note} for figure in figures}
    (folder / INDEX).write((json.dumps(titles, indent=1, ensure_ascii=False) + "\n").encode())


def check_folder(folder: StoragePath) -> None:
    """Check that figures can be written to a folder without overwriting anything else.

    Raises:
        ConfigError: the path is that of a file, or the folder has files and no figures.json.
    """
    if folder.is_file():
        raise ConfigError(f"--figures {folder}: is a file; name a folder")
    names = folder.names()
    if names and INDEX not in names:
        raise ConfigError(f"--figures {folder}: is not empty, and has no figures of a report; name another folder")


def canvas_of(figure: Figure) -> "Canvas":
    """Return the drawn figure."""
    from matplotlib.figure import Figure as Canvas

    marks = figure.marks
    canvas = Canvas(figsize=(WIDTH, _height(marks)), layout="constrained")
    axes = canvas.add_subplot()
    axes.set_title(figure.title, loc="left", fontweight="bold", wrap=True)
    if isinstance(marks, Lines):
        _lines(axes, marks)
        _scale(axes, figure.y, "y")
    elif isinstance(marks, Heat):
        _heat(canvas, axes, marks)
    elif isinstance(marks, Bars):
        _bars(axes, marks)
    elif isinstance(marks, Intervals):
        _intervals(axes, marks)
    else:
        _boxes(axes, marks)
    if not isinstance(marks, Heat):
        _scale(axes, figure.x, "x")
    axes.set_xlabel(figure.x.title, wrap=True)
    axes.set_ylabel(figure.y.title, wrap=True)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 or (labels and isinstance(marks, Lines)):
        canvas.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return canvas


def _height(marks: Any) -> float:
    if isinstance(marks, Lines):
        return 4.2
    rows = len(marks.boxes) if isinstance(marks, Boxes) else len(marks.rows if isinstance(marks, Heat) else marks.names)
    if isinstance(marks, Heat):
        return 2.6 + min(6.0, max(4, rows) * 0.18)
    return 1.7 + max(2, rows) * (0.22 if not isinstance(marks, Bars) or marks.stacked else 0.18 * len(marks.values))


def _scale(axes: "Axes", axis: Axis, which: str) -> None:
    from matplotlib.ticker import MaxNLocator

    if axis.log:
        axes.set(**{f"{which}scale": "log"})
    if axis.whole:
        getattr(axes, f"{which}axis").set_major_locator(MaxNLocator(integer=True))


def _lines(axes: "Axes", marks: Lines) -> None:
    for line in sorted(marks.lines, key=lambda one: one.style is not None):
        look, behind = style(line.style), line.style is None
        marked = not marks.connected or (len(line.x) <= MARKED_POINTS and not behind)
        axes.plot(
            line.x,
            line.y,
            color=look.colour,
            linestyle=DASHES[look.dash] if marks.connected else "none",
            linewidth=0.8 if behind else 1.6,
            marker=MARKS[look.mark] if marked else None,
            markersize=4 if marks.connected else 7,
            alpha=0.6 if behind else 1,
            label="_hidden" if behind else line.name,
        )
        if len(line.low):
            axes.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.13, linewidth=0)


def _rows(axes: "Axes", names: Sequence[str]) -> np.ndarray[Any, Any]:
    """Name the rows, and return their places, from top to bottom."""
    at = np.arange(len(names))
    axes.set_yticks(at, [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return at


def _bars(axes: "Axes", marks: Bars) -> None:
    at = _rows(axes, marks.names)
    begin = np.zeros(len(at))
    thick = 0.7 if marks.stacked else 0.7 / len(marks.values)
    for i, (part, values) in enumerate(marks.values.items()):
        place = at if marks.stacked else at + (i - (len(marks.values) - 1) / 2) * thick
        colour = COLOURS[i % len(COLOURS)]
        looks: dict[str, Any] = {
            "facecolor": colour if not i else "none",
            "edgecolor": colour,
            "hatch": PATTERNS[i % len(PATTERNS)] * 2,
        }
        axes.barh(place, values, thick, left=begin if marks.stacked else None, label=part, **looks)
        begin = begin + np.nan_to_num(values)


def _intervals(axes: "Axes", marks: Intervals) -> None:
    at = _rows(axes, marks.names)
    spread = np.stack([marks.values - marks.low, marks.high - marks.values])
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
    axes.errorbar(marks.values, at, xerr=np.clip(spread, 0, None), fmt="o", color=COLOURS[0], capsize=3)


def _boxes(axes: "Axes", marks: Boxes) -> None:
    at = _rows(axes, [box.name for box in marks.boxes])
    fields = {"med": "median", "q1": "first_quartile", "q3": "third_quartile", "whislo": "lowest", "whishi": "highest"}
    stats = [{name: getattr(box, field) for name, field in fields.items()} for box in marks.boxes]
    axes.bxp(stats, positions=at, orientation="horizontal", showfliers=False, widths=0.6, manage_ticks=False)
    points = [(value, place) for place, box in zip(at, marks.boxes, strict=True) for value in box.marked.values()]
    if points:
        axes.plot(*zip(*points, strict=True), "X", color=COLOURS[1], markersize=5, label=marks.marked)
        axes.plot([], [], "s", color="none", markeredgecolor="black", label="all clients")


def _heat(canvas: "Canvas", axes: "Axes", marks: Heat) -> None:
    from matplotlib.colors import ListedColormap

    options: dict[str, Any] = {"cmap": SEQUENTIAL.lower()}
    if (marks.values[np.isfinite(marks.values)] >= 0).all():
        options["vmin"] = 0
    if marks.kinds:
        count = len(marks.kinds)
        colours = [COLOURS[i % len(COLOURS)] for i in range(count)]
        options = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": count - 0.5}
    image = axes.imshow(marks.values, aspect="auto", interpolation="nearest", **options)
    axes.grid(visible=False)
    rows, columns = thinned(len(marks.rows), LABELLED_ROWS), thinned(len(marks.columns), LABELLED_COLUMNS)
    axes.set_yticks(rows, [shortened(marks.rows[i]) for i in rows])
    turned = max(map(len, marks.columns)) > 3
    axes.set_xticks(columns, [shortened(marks.columns[i]) for i in columns], rotation=60 if turned else 0)
    if turned:
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    bar = canvas.colorbar(image, ax=axes, label=marks.legend, fraction=0.05)
    if marks.kinds:
        bar.set_ticks(range(len(marks.kinds)), labels=list(marks.kinds))
