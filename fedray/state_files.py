"""The states of one method's clients, in files that all nodes see: whoever trains a client next reads its state there.

A file holds the states of clients that finished together, and is never changed. Processes that read and write keep some
of the bytes that they had last.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fedray.codec import Classes, pack, pack_small, unpack, unpack_small
from fedray.errors import ConfigError, StateError

CACHE_BYTES = 32_000_000
"""Bytes of files that a process keeps in memory."""


class StateRef(NamedTuple):
    """Where a state is: `entry` in a file of `of` states. text: the state itself, where it has no arrays: then there is
    no file."""

    file: str
    entry: int
    of: int
    text: str = ""


class StateFiles:
    """folder: where the files are; it is there already. classes: of what states are made (`codec.state_classes`).

    Raises:
        ConfigError: the folder is not there: this node does not see it.
    """

    def __init__(self, folder: Path, classes: Classes):
        self._folder, self._classes = folder, classes
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached = 0
        self._forgotten: Counter[str] = Counter()
        self._writer, self._written = os.urandom(4).hex(), 0
        self._small = lru_cache(maxsize=256)(lambda text: unpack_small(text, classes))  # often all clients' are equal
        if not folder.is_dir():
            raise ConfigError(
                f"storage_path: {folder} is not there on node {os.uname().nodename}; it must be a folder that all "
                "nodes of the cluster share"
            )

    def write(self, server_round: int, states: Sequence[Any]) -> list[StateRef]:
        """Write states into one new file; return where each is."""
        texts = [text for state in states if (text := pack_small(state, self._classes)) is not None]
        if len(texts) == len(states):
            return [StateRef("", 0, 1, text) for text in texts]
        name = f"{server_round:05d}-{self._writer}-{self._written:06d}.safetensors"
        self._written += 1
        blob = pack(states, self._classes)
        (self._folder / name).write_bytes(blob)
        self._keep(name, blob)
        return [StateRef(name, index, len(states)) for index in range(len(states))]

    def read(self, refs: Sequence[StateRef | None]) -> list[Any]:
        """Return the states; None for None.

        Raises:
            StateError: a file is gone or broken.
        """
        files: dict[str, list[Any]] = {}
        found: list[Any] = []
        for ref in refs:
            if ref is None:
                found.append(None)
            elif ref.text:
                found.append(self._small(ref.text))
            else:
                if ref.file not in files:
                    files[ref.file] = self._states(ref.file)
                found.append(files[ref.file][ref.entry])
        return found

    def forget(self, refs: Iterable[StateRef]) -> None:
        """Delete the files of which every state has been forgotten. A state that shares its file with others' stays
        until these are forgotten too."""
        for ref in refs:
            if ref.text:
                continue
            self._forgotten[ref.file] += 1
            if self._forgotten[ref.file] == ref.of:
                del self._forgotten[ref.file]
                self._drop(ref.file)
                (self._folder / ref.file).unlink(missing_ok=True)

    def _states(self, name: str) -> list[Any]:
        blob = self._cache.get(name)
        if blob is None:
            try:
                blob = (self._folder / name).read_bytes()
            except OSError as error:
                raise StateError(f"a client's state cannot be read: {error}") from error
        self._keep(name, blob)
        try:
            return unpack(blob, self._classes)
        except StateError as error:
            raise StateError(f"{self._folder / name}: {error}") from error

    def _keep(self, name: str, blob: bytes) -> None:
        self._drop(name)
        self._cache[name] = blob
        self._cached += len(blob)
        while self._cached > CACHE_BYTES:
            self._drop(next(iter(self._cache)))

    def _drop(self, name: str) -> None:
        if (blob := self._cache.pop(name, None)) is not None:
            self._cached -= len(blob)
