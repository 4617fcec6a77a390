"""What `import fedray` offers."""

import importlib

import pytest

import fedray


@pytest.mark.parametrize("name", fedray.__all__)
def test_a_public_name_is_found_where_the_package_says(name: str) -> None:
    """The names are imported on first use, so that a wrong place shows only then."""
    found = getattr(fedray, name)
    assert getattr(importlib.import_module(found.__module__), name) is found
