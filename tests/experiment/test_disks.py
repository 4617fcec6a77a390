"""Folders that cannot be made and files that cannot be written: one message, which names the folder and the setting."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from limits import files_of_at_most, mounted
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.config import load_config
from fedray.errors import ConfigError, FedrayError, StorageError
from fedray.experiment.resume import new_place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cached", "expected"), [(False, {"tokens", "backbones"}), (True, {"rounds.parquet", "checkpoints", "states"})]
)
def test_wherever_a_file_does_not_fit_it_is_said(
    smallest: dict[str, Any], tmp_path: Path, cached: bool, expected: set[str]
) -> None:
    """The limit grows until everything fits, so that one file after another is the first that does not. A run that had
    begun is continued to the same bits."""
    full, refused, size = tmp_path / "full", set(), 256
    smallest |= {"method": "fedalt", "lora": {"rank": 16}}  # a client's state is larger than config.yaml
    undisturbed = fedray.run(smallest, output=tmp_path / "undisturbed", data={"cache_dir": str(full)})
    while True:
        run, cache = tmp_path / f"run-{size}", full if cached else tmp_path / f"cache-{size}"
        config = {**smallest, "data": {**smallest["data"], "cache_dir": str(cache)}}
        message = failure(config, run, size)
        if message is None:
            break
        where, setting = (run, "storage_path (--output)") if cached else (cache, "data.cache_dir")
        assert setting in message
        assert f"{where}/" in message
        refused.add(message.partition(f"{where}/")[2].replace(":", "/").replace(" ", "/").split("/")[0])
        if (run / "config.yaml").exists():
            assert fedray.run(config, resume=run)["fedalt"].state_sha256 == undisturbed["fedalt"].state_sha256
        size = size * 5 // 4 if cached else size * 2
    assert expected <= refused


def failure(config: dict[str, Any], run: Path, size: int) -> str | None:
    """Return the message with which a run ends if no file may have more bytes; None if it finishes."""
    try:
        with files_of_at_most(size):
            fedray.run(config, output=run)
    except FedrayError as error:
        return str(error)
    return None


@pytest.fixture
def no_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system in which nothing can be created, even by root."""
    with mounted(tmp_path / "disk", "nr_inodes=1") as folder:
        yield folder


@pytest.mark.parametrize("setting", ["--output", "storage_path", "data.cache_dir"])
def test_a_folder_that_cannot_be_created(
    smallest: dict[str, Any], no_inodes: Path, tmp_path: Path, setting: str
) -> None:
    file, where = tmp_path / "config.yaml", no_inodes / "sub"
    file.write_text(yaml.safe_dump({**smallest, "storage_path": str(tmp_path / "runs")}))
    arguments = ["--output", str(where)] if setting == "--output" else [f"{setting}={where}"]
    result = CliRunner().invoke(app, ["run", str(file), *arguments])
    assert result.exit_code == (2 if setting == "data.cache_dir" else 1), result.output
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert f"{where}" in message
    assert setting in message
    assert "cannot be written: No space left on device" in message
    assert not list((tmp_path / "runs").iterdir() if (tmp_path / "runs").exists() else []), "an empty folder is left"


def test_a_file_in_place_of_a_folder(smallest: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=f"output {tmp_path}/file/run: {tmp_path}/file is a file; name another folder"
    ):
        fedray.run(smallest, output=tmp_path / "file" / "run")
    with pytest.raises(StorageError, match="Not a directory; .*storage_path"):
        fedray.run(smallest, storage_path=str(tmp_path / "file" / "runs"))


def test_runs_of_one_second_get_folders_of_their_own(smallest: dict[str, Any], tmp_path: Path) -> None:
    config = load_config({**smallest, "storage_path": str(tmp_path / "runs")})
    places = [new_place(config, None).local for _ in range(20)]
    assert len(set(places)) == 20
    assert all(place.is_dir() and place.parent == tmp_path / "runs" for place in places)
