"""Which updates are kept out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.config.clients import UpdateChecks
from fedray.federation.update_checks import objection, outliers, root_mean_square, too_far, too_large
from fedray.storage.state_tree import leaves, signature_of


@dataclass(frozen=True)
class Sent:
    adapter: Any
    head: Any = None


GOOD = Sent(np.zeros((2, 3), np.float32), {"b": np.ones(2, np.float32)})
EXPECTED = frozenset({signature_of(leaves(GOOD))})


def test_what_is_as_expected_passes() -> None:
    assert objection(list(leaves(GOOD)), UpdateChecks(), EXPECTED) is None
    large = Sent(np.full(2, 3e38, np.float32))
    assert objection(list(leaves(large)), UpdateChecks(), None) is None, "its square overflows"


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
    assert objection(list(leaves(payload)), UpdateChecks(), EXPECTED) == message
    assert objection(list(leaves(payload)), UpdateChecks(finite=False, shape=False), EXPECTED) is None


def test_a_number_beside_the_arrays_must_be_finite_too() -> None:
    assert objection(list(leaves(Sent(np.zeros(1), float("nan")))), UpdateChecks(), None) == "not finite: head"


def test_root_mean_squares_do_not_depend_on_sizes() -> None:
    """A weak client's adapter has fewer numbers, not smaller ones."""
    assert root_mean_square(Sent(np.full(10, 2, np.float32))) == pytest.approx(2)
    assert root_mean_square(Sent(np.full(1000, -2, np.float32), np.array([7]))) == pytest.approx(2)
    assert root_mean_square(Sent(None)) is None
    assert root_mean_square(Sent(np.full(4, 3e38, np.float32))) == pytest.approx(3e38)


def test_one_that_is_scaled_stands_out() -> None:
    payloads = {f"c{k}": Sent(np.full(5, 1 + k / 10, np.float32)) for k in range(5)}
    assert too_large(payloads, 10) == {}
    found = too_large({**payloads, "c5": Sent(np.full(5, 1e6, np.float32))}, 10)
    assert list(found) == ["c5"]
    assert "allowed: 10" in found["c5"]


def test_where_half_are_silent_nothing_is_bounded() -> None:
    assert too_large({"a": Sent(np.zeros(2)), "b": Sent(np.zeros(2)), "c": Sent(np.ones(2))}, 10) == {}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(1.001, 100))
def test_the_bound_is_relative_to_the_median(sizes: list[float], bound: float) -> None:
    payloads = {str(k): Sent(np.array([size])) for k, size in enumerate(sizes)}
    expected = {str(k) for k, size in enumerate(sizes) if size > bound * np.median(sizes) * (1 + 1e-9)}
    allowed = {str(k) for k, size in enumerate(sizes) if size > bound * np.median(sizes) * (1 - 1e-9)}
    assert expected <= set(too_large(payloads, bound)) <= allowed


def test_a_flipped_sign_is_far_away() -> None:
    """Five clients about 1, with distances from their median that are known; one has −1 everywhere: 2·√4 away."""
    payloads = {f"c{k}": Sent(np.array([1, 1, 1, 1 + k / 10], np.float32)) for k in range(5)}
    assert too_far(payloads, 3) == {}
    payloads["c5"] = Sent(-np.ones(4, np.float32))
    (found,) = too_far(payloads, 5).items()
    assert found[0] == "c5"
    assert found[1].startswith("distance 4.05 from the median of the round, ")  # √(3·2² + 2.1²)
    assert too_far(payloads, 5) == outliers(payloads, UpdateChecks(distance=5))


def test_training_in_the_wrong_direction_is_far_away() -> None:
    """All begin at 3 and learn 0.1, more or less; one goes five times as far back."""
    rng = np.random.default_rng(0)
    payloads = {f"c{k}": Sent((3.1 + 0.02 * rng.normal(size=50)).astype(np.float32)) for k in range(9)}
    payloads["hostile"] = Sent(np.full(50, 2.5, np.float32))
    assert list(too_far(payloads, 3)) == ["hostile"]


def test_only_the_alike_are_compared() -> None:
    """Two weak clients, whose adapters have fewer numbers, tell nothing about each other."""
    payloads = {f"c{k}": Sent(np.full(5, 1 + k / 10, np.float32)) for k in range(4)}
    payloads |= {"w0": Sent(np.full(2, 9, np.float32)), "w1": Sent(np.full(2, -9, np.float32))}
    assert too_far(payloads, 3) == {}
    assert too_far({"a": Sent(None), "b": Sent(None), "c": Sent(None)}, 3) == {}


@given(st.integers(3, 12), st.integers(0, 99))
def test_the_nearer_half_is_never_far_away(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    payloads = {f"c{k}": Sent(rng.normal(size=6).astype(np.float32)) for k in range(size)}
    assert len(too_far(payloads, 1.01)) <= size // 2


def test_the_large_do_not_hide_the_far() -> None:
    payloads = {f"c{k}": Sent(np.full(5, 1 + k / 10, np.float32)) for k in range(6)}
    payloads |= {"flipped": Sent(np.full(5, -1, np.float32)), "scaled": Sent(np.full(5, 1e6, np.float32))}
    assert set(outliers(payloads, UpdateChecks(norm=100, distance=4))) == {"flipped", "scaled"}
