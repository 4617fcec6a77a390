"""Files that are written whole or not at all, wherever they are."""

import os
from pathlib import Path

import pyarrow.fs as fs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import files_of_at_most

from fedray.errors import ConfigError, StorageError
from fedray.storage.paths import StoragePath, safe_name


@pytest.fixture(params=["local", "file uri", "elsewhere"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """Elsewhere: not on this machine as far as `StoragePath` knows, as HDFS would be."""
    if request.param == "elsewhere":
        return StoragePath(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "deep/run")
    return StoragePath.of(tmp_path / "deep" / "run" if request.param == "local" else f"file://{tmp_path}/deep/run")


def test_what_is_written_is_read(folder: StoragePath) -> None:
    file = folder / "a" / "b.bin"
    assert not file.is_file()
    assert folder.names() == []
    file.write(b"one")
    file.write(b"two!")
    assert (file.read(), file.size(), file.name) == (b"two!", 4, "b.bin")
    assert (file.is_file(), (folder / "a").is_folder(), (folder / "a").is_file()) == (True, True, False)
    (folder / "a" / "a.bin").write(b"", durable=False)
    assert (folder / "a").names() == ["a.bin", "b.bin"]
    file.remove()
    file.remove()
    assert (folder / "a").names() == ["a.bin"]
    folder.remove()
    assert folder.names() == []


def test_a_missing_file_is_an_os_error(folder: StoragePath) -> None:
    with pytest.raises(OSError, match="nothing"):
        (folder / "nothing").read()


def test_what_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    file = StoragePath.of(tmp_path) / "file"
    file.write(b"old")
    message = "file: cannot be written: File too large; make room, or choose"
    with files_of_at_most(1000), pytest.raises(StorageError, match=message):
        file.write(bytes(1001))
    assert file.read() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_uri_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="storage_path, output: 'nosuch://a/b' cannot be used"):
        StoragePath.of("nosuch://a/b")


def test_only_what_is_here_has_a_path(tmp_path: Path) -> None:
    assert StoragePath.of(str(tmp_path)).local == tmp_path
    assert StoragePath.of(StoragePath.of(tmp_path)) == StoragePath.of(tmp_path)
    elsewhere = StoragePath(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "x")
    with pytest.raises(ValueError, match="not on this machine"):
        elsewhere.local  # noqa: B018


def test_the_home_folder_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StoragePath.of("~/runs").local == tmp_path / "runs"


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("client_001", "client_001"),
        ("Zoë Müller", "Zo%C3%AB M%C3%BCller"),
        ("北京", "%E5%8C%97%E4%BA%AC"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        (".", "%2E"),
        ("..", "%2E."),
        ("a\0b", "a%00b"),
    ],
)
def test_ids_as_names(id: str, expected: str) -> None:
    assert safe_name(id) == expected


ID = st.text(st.characters(codec=None), max_size=300)


@given(ID, ID)
def test_an_id_leads_nowhere_else_and_to_nobody_else(one: str, other: str) -> None:
    name = safe_name(one)
    assert name not in ("", ".", "..")
    assert not set("/\\\0\n") & set(name)
    assert len(f"{name}.safetensors".encode()) < 255
    assert (name == safe_name(other)) == (one == other)
