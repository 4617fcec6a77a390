"""Single values: what is missing, what is a text, and which labels are equal."""

import math
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.data.reading.values import as_text, class_name, is_missing

NOTHING = [None, math.nan, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT")]


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_what_is_missing_is_an_empty_text_and_no_class(value: Any) -> None:
    assert is_missing(value)
    assert as_text(value) == ""
    assert class_name(value) is None


def test_words_and_numbers_are_not_missing() -> None:
    values = ["nan", "NA", "", " ", 0, 0.0, False, math.inf, [], {}, date(2020, 1, 2), np.int64(0), np.str_("x")]
    assert not any(map(is_missing, values))
    assert [as_text(value) for value in values[:7]] == ["nan", "NA", "", " ", "0", "0.0", "False"]
    assert as_text({"é": [None]}) == '{"é": [null]}'
    assert as_text([pd.NaT, pd.NA]) == "[null, null]"
    assert as_text([math.nan, {"NaN": ["NaN", math.nan, pd.NaT]}]) == '[null, {"NaN": ["NaN", null, null]}]'


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("1", [1, 1.0, "1", "1.0", " 1", "1 ", "1.", "01", "+1", np.int32(1), np.float64(1), Decimal("1.00")]),
        ("0", [0, 0.0, -0.0, "-0", "0", "00"]),
        ("-1", [-1, -1.0, "-1", " -1.0\t"]),
        ("True", [True, "True", " True", np.True_]),
        ("a b", ["a b", " a b", "a b\n", "\u00a0a b"]),
        ("é", ["é", "e\u0301"]),
        ("1.5", ["1.5"]),
        ("1e3", ["1e3"]),
        ("1_0", ["1_0"]),
        ("١", ["١"]),  # a digit, but not one that Python's and numpy's readers write
        ("9" * 5000, ["9" * 5000]),  # more digits than Python turns into a number
    ],
)
def test_equal_labels_have_one_name(name: str, labels: list[Any]) -> None:
    assert {class_name(label) for label in labels} == {name}


@pytest.mark.parametrize("label", ["", "  ", 0.5, math.inf, Decimal("0.5"), Decimal("Infinity"), [1], {"a": 1}])
def test_what_names_no_class(label: Any) -> None:
    assert class_name(label) is None


@given(st.integers(-(10**18), 10**18), st.integers(0, 3), st.sampled_from(["", ".", ".0", ".000"]))
def test_whole_numbers_are_equal_as_numbers(number: int, zeros: int, end: str) -> None:
    sign, digits = ("-", str(-number)) if number < 0 else ("", str(number))
    assert class_name(f" {sign}{'0' * zeros}{digits}{end} ") == class_name(number) == str(number)
