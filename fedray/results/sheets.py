"""Tables in any format: for the console, as text, as Markdown, as LaTeX."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from fedray.results.report import plain_table

WIDTH = 100
"""Columns of the tables as text in a file."""
LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"Δ": r"$\Delta$", "±": r"$\pm$", "<": "$<$", ">": "$>$"},
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        best: whether it is the best of its column.
    """

    text: str
    best: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table in no format yet.

    Attributes:
        columns: heads of the columns; of these the first is left-aligned, the others are right-aligned.
        notes: what stands below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def rich_tables(sheets: Sequence[Sheet]) -> RenderableType:
    """Return tables for a console."""
    parts: list[RenderableType] = []
    for sheet in sheets:
        table = plain_table(None, sheet.columns[:1], sheet.columns[1:])
        for row in sheet.rows:
            table.add_row(*(Text(cell.text, "bold" if cell.best else "") for cell in row))
        parts += [Text(sheet.title, "italic"), table]
        parts += [Padding(Text(note), (0, 0, 0, 1)) for note in sheet.notes]
        parts += [Text("")] if sheet.notes else []
    return Group(*parts)


def plain_text(sheets: Sequence[Sheet]) -> str:
    """Return tables as text without colours, `WIDTH` columns wide."""
    out = StringIO()
    Console(file=out, width=WIDTH, color_system=None).print(rich_tables(sheets))
    return out.getvalue()


def markdown(sheets: Sequence[Sheet]) -> str:
    """Return tables as Markdown; the best value of a column is bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    blocks = []
    for sheet in sheets:
        lines = [f"**{sheet.title}**", "", line([" ".join(name.split()) for name in sheet.columns])]
        lines.append(f"|{'|'.join(['---', *['---:'] * (len(sheet.columns) - 1)])}|")
        lines += [line([f"**{cell.text}**" if cell.best else cell.text for cell in row]) for row in sheet.rows]
        lines += ["", *(f"- {note}" for note in sheet.notes)] if sheet.notes else []
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def latex(sheets: Sequence[Sheet]) -> str:
    """Return tables as `tabular` environments of booktabs, with titles and notes as comments."""
    blocks = []
    for sheet in sheets:
        heads = " & ".join(_latex(" ".join(name.split())) for name in sheet.columns)
        rows = [" & ".join(_bold(_latex(cell.text), cell.best) for cell in row) + r" \\" for row in sheet.rows]
        lines = [f"% {sheet.title}", rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}", r"\toprule"]
        lines += [heads + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
        blocks.append("\n".join([*lines, *(f"% {note}" for note in sheet.notes)]))
    return "\n\n".join(blocks) + "\n"


FORMATS: dict[str, Callable[[Sequence[Sheet]], str]] = {"table": plain_text, "markdown": markdown, "latex": latex}
"""How tables are written as text, by name."""


def _latex(text: str) -> str:
    """Return text with LaTeX's own signs escaped, and hyphens before numbers as minus signs."""
    escaped = "".join(LATEX.get(sign, sign) for sign in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escaped)


def _bold(text: str, best: bool) -> str:
    return rf"\textbf{{{text}}}" if best else text
