"""Which updates are kept out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.config.clients import UpdateChecks
from fedray.state import leaves, signature_of
from fedray.update_checks import objection, outliers, root_mean_square


@dataclass(frozen=True)
class Sent:
    adapter: Any
    head: Any = None


GOOD = Sent(np.zeros((2, 3), np.float32), {"b": np.ones(2, np.float32)})
EXPECTED = frozenset({signature_of(leaves(GOOD))})


def test_what_is_as_expected_passes() -> None:
    assert objection(GOOD, UpdateChecks(), EXPECTED) is None
    assert objection(Sent(np.full(2, 3e38, np.float32)), UpdateChecks(), None) is None, "its square overflows"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (Sent(np.zeros((3, 2), np.float32), GOOD.head), "wrong shape: adapter is <f4 [3, 2], expected <f4 [2, 3]"),
        (Sent(np.zeros((2, 3)), GOOD.head), "wrong shape: adapter is <f8 [2, 3], expected <f4 [2, 3]"),
        (Sent(GOOD.adapter), "wrong shape: head/b is absent, expected <f4 [2]"),
        (Sent(GOOD.adapter, {**GOOD.head, "c": np.zeros(1)}), "wrong shape: head/c is <f8 [1], expected absent"),
        (Sent(np.full((2, 3), np.nan, np.float32), GOOD.head), "not finite: adapter"),
        (Sent(GOOD.adapter, {"b": np.array([0, -np.inf], np.float32)}), "not finite: head/b"),
    ],
)
def test_what_is_not_is_named(payload: Any, message: str) -> None:
    assert objection(payload, UpdateChecks(), EXPECTED) == message
    assert objection(payload, UpdateChecks(finite=False, shape=False), EXPECTED) is None


def test_a_number_beside_the_arrays_must_be_finite_too() -> None:
    assert objection(Sent(np.zeros(1), float("nan")), UpdateChecks(), None) == "not finite: head"


def test_root_mean_squares_do_not_depend_on_sizes() -> None:
    """A weak client's adapter has fewer numbers, not smaller ones."""
    assert root_mean_square(Sent(np.full(10, 2, np.float32))) == pytest.approx(2)
    assert root_mean_square(Sent(np.full(1000, -2, np.float32), np.array([7]))) == pytest.approx(2)
    assert root_mean_square(Sent(None)) is None
    assert root_mean_square(Sent(np.full(4, 3e38, np.float32))) == pytest.approx(3e38)


def test_one_that_is_scaled_stands_out() -> None:
    payloads = {f"c{k}": Sent(np.full(5, 1 + k / 10, np.float32)) for k in range(5)}
    assert outliers(payloads, 10) == {}
    found = outliers({**payloads, "c5": Sent(np.full(5, 1e6, np.float32))}, 10)
    assert list(found) == ["c5"]
    assert "allowed: 10" in found["c5"]


def test_where_half_are_silent_nothing_is_bounded() -> None:
    assert outliers({"a": Sent(np.zeros(2)), "b": Sent(np.zeros(2)), "c": Sent(np.ones(2))}, 10) == {}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(1.001, 100))
def test_the_bound_is_relative_to_the_median(sizes: list[float], bound: float) -> None:
    payloads = {str(k): Sent(np.array([size])) for k, size in enumerate(sizes)}
    expected = {str(k) for k, size in enumerate(sizes) if size > bound * np.median(sizes) * (1 + 1e-9)}
    allowed = {str(k) for k, size in enumerate(sizes) if size > bound * np.median(sizes) * (1 - 1e-9)}
    assert expected <= set(outliers(payloads, bound)) <= allowed
