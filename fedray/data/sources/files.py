"""`files`: files of the kinds that `fedray.data.reading.readers` reads, by split, and by task or client."""

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from fedray.config import DataConfig, RawRows, absolute
from fedray.data.reading.readers import FileName, read_file
from fedray.errors import DataError, choices, nearest
from fedray.types import COMMON, ROLES, Role, Task


class Files(DataConfig):
    """Every named entry, or every file of a pattern, is a natural client and a task; in a file with the rows of several
    clients, each is a natural client of its own."""

    files: dict[str, str | dict[str, str | dict[str, str]]] = Field(default_factory=dict)
    """{train: PATH, validation: PATH, test: PATH, common: PATH}, or one such mapping (or one path) per task or client:
    {NAME: {train: PATH, ...}} or {NAME: PATH}. `test` is assigned to the clients, and every client's model is evaluated
    on all of `common`. Several test sets are {test: {NAME: PATH, ...}}, each scored apart, too; `common` likewise.
    .jsonl, .json (an array of rows, {"data": [...]}, or {CLIENT: [...], CLIENT: [...]}, whose natural clients are the
    keys), .csv, .tsv, .parquet; all but Parquet also compressed, such as .csv.gz or .jsonl.zst. A path may hold `*`."""

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        if not self.files:
            raise ValueError("files: the source `files` needs at least {train: PATH}")
        return self

    def with_absolute_paths(self, folder: Path) -> Self:
        return super().with_absolute_paths(folder).model_copy(update={"files": _absolute(self.files, folder)})

    def load(self, task: Task, seed: int, num_clients: int | None) -> Iterator[RawRows]:
        # With a `train` among them the keys are splits; a misspelt one must not become a client.
        if isinstance(self.files.get("train"), str):
            yield from _read_splits(self.files, None, "data.files")
            return
        for name, entry in self.files.items():
            where = f"data.files.{name}"
            if name in ROLES and (name == COMMON or isinstance(entry, str)):
                yield from _read_splits({name: entry}, None, "data.files")
            elif isinstance(entry, dict):
                if "train" not in entry:
                    raise DataError(f"{where}: names no file for train")
                yield from _read_splits(entry, name, where)
            else:
                yield from _read_pattern(entry, "train", name, where)


def _read_splits(entry: Mapping[str, Any], name: str | None, where: str) -> Iterator[RawRows]:
    """Yield the files of a mapping from splits to paths, or to several test sets' paths.

    Args:
        name: of the task and client; None names each file after itself.
    """
    for split in entry:
        if split not in ROLES:
            raise DataError(f"{where}: unknown split {split!r}{nearest(split, ROLES)}; allowed: {choices(ROLES)}")
    for split in ROLES:
        found = entry.get(split)
        if isinstance(found, dict) and split in ("train", "validation"):
            raise DataError(f"{where}.{split}: expected a path; only test and common name several sets")
        if isinstance(found, dict):
            for test_set, path in found.items():
                for raw in _read_pattern(path, split, name, f"{where}.{split}.{test_set}"):
                    yield replace(raw, test_set=test_set)
        elif found is not None:
            yield from _read_pattern(found, split, name, f"{where}.{split}")


def _absolute(entry: Any, folder: Path) -> Any:
    """Return paths, and mappings of them, with absolute paths."""
    if isinstance(entry, dict):
        return {name: _absolute(value, folder) for name, value in entry.items()}
    return absolute(entry, folder)


def _read_pattern(pattern: str, split: Role, name: str | None, where: str) -> Iterator[RawRows]:
    """Yield the files of a path that may hold `*`; without a given name each is named after itself."""
    path = Path(pattern).expanduser()
    # Brackets are part of a folder's name.
    parts = [part if "*" in part else glob.escape(part) for part in path.parts]
    paths = sorted(Path(found) for found in glob.glob(str(Path(*parts)))) if "*" in pattern else [path]
    if not paths:
        raise DataError(f"{where}: no file matches {pattern!r} from {Path.cwd()}")
    for found, own_name in zip(paths, _names(paths), strict=True):
        if not found.is_file():
            siblings = [entry.name for entry in found.parent.iterdir()] if found.parent.is_dir() else []
            raise DataError(
                f"{where}: no such file: {found}{nearest(found.name, siblings)}; relative paths start from {Path.cwd()}"
            )
        file = own_name if name is None else name
        for raw in read_file(found, split, file, file):
            of_entry = name is not None and raw.file != name
            yield replace(raw, file=f"{name}/{raw.file}") if of_entry else raw


def _names(paths: list[Path]) -> list[str]:
    """Return a name for every file: its stem, or its folder's name where stems repeat (boolq/train.json)."""
    stems = [FileName.of(path).stem for path in paths]
    for names in (stems, [path.parent.name for path in paths]):
        if len(set(names)) == len(paths):
            return names
    common = Path(os.path.commonpath(paths))  # how the pattern is written, absolute or not, must not make other clients
    return [path.relative_to(common).with_name(stem).as_posix() for path, stem in zip(paths, stems, strict=True)]


ENTRY = Files
