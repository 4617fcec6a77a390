"""Small examples and configurations that the tests of `fedray.data` share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedray.config import Config, RawRows, load_config
from fedray.data.examples import Examples, assemble
from fedray.data.sources.files import Files


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that makes a configuration with the byte tokenizer and a cache of its own."""

    def make(data: dict[str, Any], partition: dict[str, Any] | None = None, **sections: Any) -> Config:
        return load_config(
            {
                "rounds": 1,
                "method": "fedavg",
                "model": {"path": "random", "config": {"model_type": "bert"}, "tokenizer": "bytes"},
                "data": {"cache_dir": str(tmp_path / "cache"), "max_length": 16} | data,
                "partition": partition or {},
            }
            | sections
        )

    return make


@pytest.fixture(scope="session")
def labelled() -> Callable[..., Examples]:
    """Return a function that makes classified examples from labels: row i is `text i`, or `text i of KIND`.

    Every part is (split, file, task, labels).
    """

    def make(*parts: tuple[Any, str, str, Sequence[str]]) -> Examples:
        made = []
        for number, (split, file, task, labels) in enumerate(parts):
            columns = {"text": [f"text {number}.{i}" for i in range(len(labels))], "label": list(labels)}
            made.append(RawRows(f"part {number}", columns, split, file, task))
        return assemble(made, Files(files={"train": "-"}), "classification")

    return make
