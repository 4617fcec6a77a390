"""The folder of a run: what it may not overwrite, who may write to it, and what clients may be called."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedray.config import Config, load_config
from fedray.errors import ConfigError, StateError
from fedray.experiment.run_folder import RunFolder, check_empty
from fedray.storage.paths import StoragePath
from fedray.storage.tables import Table


@pytest.fixture
def config(smallest: dict[str, Any]) -> Config:
    return load_config(smallest)


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path, config: Config) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=f"output {tmp_path}: exists and is not empty; name another folder"):
        RunFolder(StoragePath.of(tmp_path), config)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "result"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        RunFolder(StoragePath.of(path), config)
    assert path.read_text() == "mine"


def test_new_and_empty_folders_are_free(tmp_path: Path, config: Config) -> None:
    check_empty(StoragePath.of(tmp_path))
    check_empty(StoragePath.of(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
    RunFolder(StoragePath.of(tmp_path), config)
    RunFolder(StoragePath.of(tmp_path / "a" / "b"), config)
    assert load_config(tmp_path / "a" / "b" / "config.yaml") == config


def test_two_processes_do_not_write_to_one_folder(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedray.experiment.run_folder.LOCK_PATIENCE_S", 0.1)
    first = RunFolder(StoragePath.of(tmp_path), config)
    with pytest.raises(ConfigError, match="another process is writing here"):
        RunFolder(StoragePath.of(tmp_path), config, resume=True)
    first.close()
    RunFolder(StoragePath.of(tmp_path), config, resume=True).close()


@pytest.mark.parametrize("error", [StateError, MemoryError])
def test_the_lock_goes_whatever_happens_to_the_tables(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A disk that fails is not told again; everything else is."""
    folder = RunFolder(StoragePath.of(tmp_path), config)
    with monkeypatch.context() as broken:
        broken.setattr(Table, "compact", Mock(side_effect=error))
        with nullcontext() if error is StateError else pytest.raises(error):
            folder.close()
    RunFolder(StoragePath.of(tmp_path), config, resume=True).close()


def test_a_client_may_have_any_name(tmp_path: Path, config: Config) -> None:
    """A client called `server` overwrites no other file."""
    folder = RunFolder(StoragePath.of(tmp_path), config)
    states = {name: {"value": np.array([n])} for n, name in enumerate(["server", "client/server", "client/x"])}
    folder.begin("fedavg", None)
    assert list(folder.write_states("fedavg", states.items())) == list(states.items())
    values = sorted(int(load_file(path)["value"][0]) for path in tmp_path.rglob("*.safetensors"))
    assert values == [0, 1, 2]
