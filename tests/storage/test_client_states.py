"""Clients' states in files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedray.errors import ConfigError, StateError
from fedray.storage import client_states as state_files
from fedray.storage.client_states import StateFiles
from fedray.storage.paths import StoragePath
from fedray.types import state_type


@state_type("test_state_files.Kept")
@dataclass(frozen=True)
class Kept:
    values: Any
    often: int = 0


def kept(*numbers: float, size: int = 10) -> list[Kept]:
    return [Kept(np.full(size, number, np.float32)) for number in numbers]


def read(files: StateFiles, refs: list[Any]) -> list[float]:
    return [state.values[0] for state in files.read(refs)]


def test_another_process_reads_what_was_written(tmp_path: Path) -> None:
    refs = StateFiles(StoragePath.of(tmp_path)).write(3, kept(1, 2, 3))
    other = StateFiles(StoragePath.of(tmp_path))
    assert read(other, refs[::-1]) == [3, 2, 1]
    assert other.read([None, refs[1], None])[::2] == [None, None]
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writers_never_use_the_same_name(tmp_path: Path) -> None:
    one, other = (StateFiles(StoragePath.of(tmp_path)) for _ in range(2))
    refs = [writer.write(0, kept(number))[0] for number, writer in enumerate((one, other, one, other))]
    assert read(one, refs) == read(other, refs) == [0, 1, 2, 3]


def test_states_without_arrays_need_no_file(tmp_path: Path) -> None:
    files = StateFiles(StoragePath.of(tmp_path))
    states = [Kept(None, 5), Kept(np.zeros(0, np.float32), 6)]
    refs = files.write(0, states)
    assert [state.often for state in files.read(refs)] == [5, 6]
    files.forget(refs)
    assert list(tmp_path.iterdir()) == []


def test_a_file_goes_when_all_its_states_are_forgotten(tmp_path: Path) -> None:
    files = StateFiles(StoragePath.of(tmp_path))
    first, second = files.write(0, kept(1, 2)), files.write(0, kept(3))
    files.forget(first[:1])
    assert len(list(tmp_path.iterdir())) == 2
    assert read(files, first[1:]) == [2]
    files.forget(first[1:])
    assert [path.name for path in tmp_path.iterdir()] == [second[0].file]


def test_what_is_kept_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 30,000 numbers has 120 KB and a header: three fit into 370 KB. The one used longest ago goes first; one
    that is larger than everything is not kept, and is read all the same."""
    monkeypatch.setattr(state_files, "CACHE_BYTES", 370_000)
    files = StateFiles(StoragePath.of(tmp_path))
    refs = [files.write(0, kept(number, size=30_000))[0] for number in range(4)]
    assert read(files, [refs[0], refs[1], refs[2], refs[0], refs[3]]) == [0, 1, 2, 0, 3]
    for ref in refs:
        (tmp_path / ref.file).unlink()
    assert read(files, [refs[0], refs[2], refs[3]]) == [0, 2, 3]
    with pytest.raises(StateError, match="cannot be read"):
        files.read([refs[1]])
    (large,) = files.write(0, kept(9, size=100_000))
    assert read(files, [large]) == [9]
    assert files._cached == sum(size for _, size in files._cache.values()) <= 370_000


def test_a_large_state_is_alone_in_its_file(tmp_path: Path) -> None:
    """Six states of 40 KB: three make 100 KB. One of 400 KB ends its file."""
    files = StateFiles(StoragePath.of(tmp_path))
    refs = files.write(0, [*kept(1, 2, 3, 4, 5, 6, size=10_000), *kept(7, 8, size=100_000)])
    assert [(ref.entry, ref.of) for ref in refs] == [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3), (2, 3), (0, 1), (0, 1)]
    assert read(files, refs) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (ref,) = StateFiles(StoragePath.of(tmp_path)).write(0, kept(1))
    path = tmp_path / ref.file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StateError, match=ref.file):
        StateFiles(StoragePath.of(tmp_path)).read([ref])


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage_path, output: .*gone does not exist on node .*all nodes"):
        StateFiles(StoragePath.of(tmp_path / "gone"))
