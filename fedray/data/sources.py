"""The configured source, read and checked: from a hub dataset, files, installed libraries or a generator."""

import glob
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedray.config import DataConfig
from fedray.data.docstrings import read_docstrings
from fedray.data.examples import Block, Examples, assemble
from fedray.data.readers import read_file, read_hub
from fedray.data.synthetic import GROUP, generate
from fedray.errors import DataError, choices, nearest
from fedray.types import SPLITS, Split, Task


def load_source(data: DataConfig, task: Task, seed: int, num_clients: int | None = None) -> Examples:
    """Read all examples of the configured source and check every one.

    num_clients: how many clients the synthetic source plants; the other sources do not need it.

    Raises:
        DataError: the source cannot be found or read, or a row does not hold what the configuration says.
    """
    if data.source == "synthetic":
        blocks = generate(data, num_clients, seed)
        groups = np.concatenate([np.asarray(block.columns[GROUP], dtype=np.int64) for block in blocks])
        return replace(assemble(blocks, data, task), latent_group=groups)
    if data.source == "hub":
        return assemble(read_hub(data), data, task)
    if data.source == "docstrings":
        return assemble(
            read_docstrings(data.libraries, data.max_per_client, Path(data.cache_dir).expanduser()), data, task
        )
    return assemble(list(_read_files(data)), data, task)


def _read_files(data: DataConfig) -> Iterator[Block]:
    """Yield the configured files; one task or client per entry that is not a split."""
    # With a `train` beside them the keys are splits; a misspelt one must not become a client.
    if isinstance(data.files.get("train"), str):
        _check_splits(data.files, "data.files")
    for name, entry in data.files.items():
        where = f"data.files.{name}"
        if isinstance(entry, dict):
            _check_splits(entry, where)
            if "train" not in entry:
                raise DataError(f"{where}: names no file for train")
            for split in SPLITS:
                if split in entry:
                    yield from _read_pattern(entry[split], split, name, f"{where}.{split}")
        elif name in SPLITS:
            yield from _read_pattern(entry, name, None, where)
        else:
            yield from _read_pattern(entry, "train", name, where)


def _check_splits(names: dict[str, str] | dict[str, str | dict[str, str]], where: str) -> None:
    for name in names:
        if name not in SPLITS:
            raise DataError(f"{where}: unknown split {name!r}{nearest(name, SPLITS)}; allowed: {choices(SPLITS)}")


def _read_pattern(pattern: str, split: Split, name: str | None, where: str) -> Iterator[Block]:
    """Yield the files of a path that may hold `*`; without a given name each is named after itself."""
    path = Path(pattern).expanduser()
    paths = sorted(Path(found) for found in glob.glob(str(path))) if "*" in pattern else [path]
    if not paths:
        raise DataError(f"{where}: no file matches {pattern!r} from {Path.cwd()}")
    for found, own_name in zip(paths, _names(paths), strict=True):
        if not found.is_file():
            siblings = [entry.name for entry in found.parent.iterdir()] if found.parent.is_dir() else []
            raise DataError(
                f"{where}: no such file: {found}{nearest(found.name, siblings)}; relative paths start from {Path.cwd()}"
            )
        file = own_name if name is None else name
        yield read_file(found, split, file, file)


def _names(paths: list[Path]) -> list[str]:
    """Return a name for every file: its stem, or its folder's name where stems repeat (boolq/train.json)."""
    for names in ([path.stem for path in paths], [path.parent.name for path in paths]):
        if len(set(names)) == len(paths):
            return names
    return [path.with_suffix("").as_posix() for path in paths]
