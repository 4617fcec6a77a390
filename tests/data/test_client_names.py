"""Names of clients."""

from collections.abc import Callable

from fedray.data.client_names import safe_names
from fedray.data.examples import Examples

Labelled = Callable[..., Examples]


def test_names_stay_unique_also_where_case_does_not_count() -> None:
    assert safe_names(["a b", "a_b", "A-b", "a?b", "", "../é"]) == [
        "a_b",
        "a_b_2",
        "A-b",
        "a_b_3",
        "unnamed",
        "unnamed_2",
    ]
    assert safe_names(["ALL", "All"]) == ["ALL", "All_2"]
