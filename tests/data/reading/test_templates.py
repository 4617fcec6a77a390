"""Templates: fields that must be there, fields that may be empty, and sections that then vanish."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.config import RawRows
from fedray.data.reading.templates import filled, optional_columns
from fedray.errors import DataError

ALPACA = "{instruction}{input?:\n\n### Input:\n{input}}\n\n### Response:\n"


def fill(template: str, *rows: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    return filled(RawRows("file", {n: [row.get(n) for row in rows] for n in names}), template, "data.prompt")


def test_a_section_is_left_out_where_its_field_is_empty() -> None:
    rows = [{"instruction": "Add.", "input": value} for value in ("1+1", "", " \n", None, float("nan"), 0)]
    with_input = "Add.\n\n### Input:\n{}\n\n### Response:\n"
    without = "Add.\n\n### Response:\n"
    assert fill(ALPACA, *rows) == [with_input.format("1+1"), without, without, without, without, with_input.format(0)]


def test_a_file_may_lack_the_column_of_an_optional_field() -> None:
    assert fill(ALPACA, {"instruction": "Add."}) == ["Add.\n\n### Response:\n"]
    assert fill("{a?}{b?: (with a, b)}", {"a": "x"}, {"a": None}) == ["x", ""]


def test_sections_hold_other_fields_sections_and_braces() -> None:
    template = "{a?:A {a}{b?: and {b}} {{{c}}}}."
    rows = [{"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": None, "c": "3"}, {"a": "", "b": "2", "c": "3"}]
    assert fill(template, *rows) == ["A 1 and 2 {3}.", "A 1 {3}.", "."]
    assert list(optional_columns(template, "data.prompt")) == ["a", "b"]
    assert list(optional_columns("{a} {b?}", "data.prompt")) == ["b"]


def test_a_column_may_have_a_name_that_ends_in_a_question_mark() -> None:
    assert fill("{spam?}!", {"spam?": "yes"}) == ["yes!"]


def test_colons_and_exclamation_marks_in_a_section_are_text() -> None:
    assert fill("{a?:Note: {a}!s: hello!}", {"a": "x"}) == ["Note: x!s: hello!"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a", "data.prompt: '{a' is not a template"),
        ("a}", "write {{ for a brace"),
        ("{}", "a field must be a column's name in braces, such as {text}"),
        ("{?}", "a column's name"),
        ("{a!r}", "a column's name"),
        ("{a:>5}", "a column's name"),
        ("{a?:{b!r}}", "a column's name"),
        ("{b}", "no column 'b' (data.prompt); its columns: a"),
        ("{a?:{b}}", "no column 'b' (data.prompt)"),
    ],
)
def test_what_is_no_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        fill(template, {"a": "x"})
    assert message in str(caught.value)


@given(st.lists(st.tuples(st.text(), st.one_of(st.text(), st.none())), min_size=1))
def test_an_ordinary_template_is_filled_as_python_does(rows: list[tuple[str, str | None]]) -> None:
    template = "<{a}> {{x}} {b} [{a}]"
    expected = [template.format(a=a, b="" if b is None else b) for a, b in rows]
    assert fill(template, *({"a": a, "b": b} for a, b in rows)) == expected
