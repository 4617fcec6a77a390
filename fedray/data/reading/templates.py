"""Templates of prompts and answers: text with {column} fields, some of which may be empty.

`{input}` is the column's value, and every file must have the column. `{input?}` is empty where a file lacks the column.
`{input?:TEXT}` is TEXT where the row's input is not empty, and nothing otherwise; TEXT may have fields of its own:

    {instruction}{input?:\\n\\n### Input:\\n{input}}\\n\\n### Response:\\n
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter

from fedray.config import RawRows
from fedray.data.reading.values import as_text, column_of
from fedray.errors import DataError


@dataclass(frozen=True)
class Field:
    """A field of a template.

    Attributes:
        column: whose value decides.
        optional: whether rows may lack it.
        section: what stands there if the value is not empty; None: the value itself.
    """

    column: str
    optional: bool
    section: "Template | None" = None


Template = Sequence[str | Field]


def parse_template(template: str, setting: str) -> Template:
    """Return a template's parts: literal texts and fields.

    Args:
        setting: that holds the template, for the message.

    Raises:
        DataError: unbalanced braces, or a field that is no column's name.
    """
    try:
        found = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"{setting}: {template!r} is not a template: {error}; write {{{{ for a brace") from None
    parts: list[str | Field] = []
    for literal, name, section, conversion in found:
        parts += [literal] if literal else []
        if name is None:
            continue
        column = name.removesuffix("?")
        optional = column != name
        if not column or conversion or (section and not optional):
            raise DataError(
                f"{setting}: {template!r}: a field must be a column's name in braces, such as {{text}}; {{text?}} may "
                "be empty, and {text?:...} is left out where the text is empty"
            )
        parts.append(Field(column, optional, parse_template(section, setting) if section else None))
    return parts


def filled(raw: RawRows, template: str, setting: str) -> list[str]:
    """Return the template filled in with the values of every row.

    Raises:
        DataError: as `parse_template`; or a column is missing whose field is not optional.
    """
    return _filled(raw, parse_template(template, setting), setting)


def optional_columns(template: str, setting: str) -> Iterator[str]:
    """Yield the columns that rows may lack."""
    waiting = list(parse_template(template, setting))
    for part in waiting:
        if isinstance(part, Field):
            waiting += part.section or ()
            if part.optional:
                yield part.column


def _filled(raw: RawRows, template: Template, setting: str) -> list[str]:
    pieces = [[part] * len(raw) if isinstance(part, str) else _field(raw, part, setting) for part in template]
    return ["".join(row) for row in zip(*pieces, strict=True)] if pieces else [""] * len(raw)


def _field(raw: RawRows, field: Field, setting: str) -> list[str]:
    if not field.optional:
        return [as_text(value) for value in column_of(raw, field.column, setting)]
    # A question mark may be the end of a column's own name.
    named = next((name for name in (field.column, f"{field.column}?") if name in raw.columns), None)
    values = [as_text(value) for value in raw.columns[named]] if named is not None else []
    if not any(value.strip() for value in values):
        return [""] * len(raw)
    texts = values if field.section is None else _filled(raw, field.section, setting)
    return [text if value.strip() else "" for text, value in zip(texts, values, strict=True)]
